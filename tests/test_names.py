"A public name of the package means one thing: a reader who meets it need not ask which."
import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parent.parent/"peer_nb"

# name -> why it may stand in several modules
ALIKE = {
    "main": "the entry point of a command or of a process; nobody imports one by name",
    "compare": "a subcommand of peer-analyze is named after what a user types",
    "parameters": "a subcommand of peer-analyze is named after what a user types",
}
# Names that still mean two things, with where the second meaning stands. This list only gets shorter.
STILL = {
    "Asked": "questions of a data set in recall, what a task asks",
    "Job": "a job of the ablation of keys, a job of a place that runs runs",
    "Place": "a text that knows its line in the study's file, where runs run",
    "Progress": "what a heartbeat says, in watch",
    "build_dataloader": "for a configuration in packing, for padded and varlen rows in collate",
    "by_row": "on the CPU, and as kernels",
    "counted": "masked tokens, runs of an arm",
    "differences": "between configurations, between states of a loader",
    "environment": "of a process in local, of results elsewhere",
    "file_hash": "of whole files, of a corpus's file",
    "known_keys": "of the configuration, of a study",
    "open_source": "of layers, of documents",
    "records": "of Slurm's accounting, of a corpus",
    "retrieve": "the operation, and its kernel",
    "summary": "of answers, of a study under way, of a corpus",
    "table_html": "watch's own",
    "Table": "runs under way in watch, rows under headings in tables",
    "verdict": "of Slurm about a job, of a claim",
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
    new = {name: modules for name, modules in twice.items() if name not in ALIKE and name not in STILL}
    assert not new, f"defined in several modules; import the one, or give the other a name of its own: {new}"
    assert not {*ALIKE} & {*STILL}
