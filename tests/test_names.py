"A public name of the package means one thing: a reader who meets it need not ask which."
import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent/"peer_nb"

# name -> why it may stand in several modules
ALIKE = {
    "main": "the entry point of a command or of a process; nobody imports one by name",
    "compare": "a subcommand of peer-analyze is named after what a user types",
    "convert": "a subcommand of peer-analyze is named after what a user types",
    "parameters": "a subcommand of peer-analyze is named after what a user types",
}


def patched(node: ast.FunctionDef | ast.ClassDef) -> bool:
    "Whether a function is a method of a class that stands elsewhere"
    return any("patch" in ast.unparse(d) for d in node.decorator_list)


def public_names() -> dict[str, list[str]]:
    "Function or class -> modules that define it"
    found = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name.startswith("_"): continue
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and not patched(node): found[node.name].append(module)
    return found


def test_no_public_name_means_two_things():
    twice = {name: modules for name, modules in public_names().items() if len(modules) > 1}
    new = {name: modules for name, modules in twice.items() if name not in ALIKE}
    assert not new, f"defined in several modules; import the one, or give the other a name of its own: {new}"
