"""The order of the pages: numbers that follow the imports, links that follow the numbers, a sidebar made from both.

    python tests/house.py             number the pages anew where one imports a later page of its room; write the sidebar
    python tests/house.py check       only say what would change (exit code 1)
"""
import json
import os
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"""(\]\(|(?:href|src)=\\?["'])([\w./-]+?\.ipynb)(?=[#)"'\\\s])""")
GUIDES = {"Start": "start", "How-to": "how_to", "Reference": "reference"}   # pages that export nothing, by what a reader wants
BEFORE = {"How-to": ["where_to_add.ipynb"]}
RESULTS = [{"text": "A finished study", "href": "example/index.html"}, {"text": "Seven sparse layers at equal work", "href": "results/sparse_layers/index.html"},
           {"text": "A bridge and its controls", "href": "results/bridge/index.html"}, "benchmarks.ipynb"]


def rooms(root: Path = ROOT) -> dict[str, dict]:
    "Folder of notebooks -> title and floor, in the order of the sidebar"
    return yaml.safe_load((root/"nbs"/"house.yaml").read_text())


def floors(root: Path = ROOT) -> dict[str, int]:
    "Module or room of the package -> floor"
    houses = {name.partition("/")[0]: room["floor"] for name, room in rooms(root).items() if name != "ground"}
    return houses | {name: 0 for name, _ in pages("ground", root)}


def exported(path: Path) -> tuple[str, str]:
    "A notebook's module, and the code that it exports"
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    module = next((m[1] for c in cells if (m := re.search(r"default_exp\s+([\w.]+)", c))), "")
    return module, "\n".join(c for c in cells if re.search(r"^\s*#\s*\|\s*export", c, re.M))


def pages(room: str, root: Path = ROOT) -> list[tuple[str, Path]]:
    "Modules and notebooks of a room, by number"
    folder = root/"nbs"/("" if room == "ground" else room)
    return [(exported(p)[0], p) for p in sorted(folder.glob("[0-9]*.ipynb"))]


def in_order(room: str, root: Path = ROOT) -> list[Path]:
    "The notebooks of a room so that none imports a later one, as near to today's order as that allows"
    found = pages(room, root)
    names = {module: path for module, path in found}
    needs = {path: {names[m] for m in re.findall(r"from peer_nb\.([\w.]+) import", exported(path)[1]) if m in names} - {path} for _, path in found}
    out = []
    while len(out) < len(found):
        ready = [p for p in needs if p not in out and needs[p] <= {*out}]
        if not ready: raise SystemExit(f"{room}: a circle among {', '.join(p.name for p in needs if p not in out)}")
        out.append(ready[0])
    return out


def renamed(root: Path = ROOT) -> dict[Path, Path]:
    "Notebooks that need another number"
    new = {}
    for room in rooms(root):
        for n, path in enumerate(in_order(room, root)):
            name = f"{n:02d}_" + re.sub(r"^\d+[a-z]?_", "", path.name)
            if name != path.name: new[path] = path.with_name(name)
    return new


def relink(text: str, path: Path, new: dict[Path, Path]) -> str:
    "The links of a file, following pages that got another number"
    def follow(m):
        target = Path(os.path.normpath(path.parent/m[2]))
        return m[1] + os.path.relpath(new[target], path.parent) if target in new else m[0]
    return LINK.sub(follow, text)


def sidebar(root: Path = ROOT) -> list:
    "The contents of the site's sidebar: what people come for first, the modules last"
    nbs = root/"nbs"
    found = lambda folder: [str(p.relative_to(nbs)) for p in sorted((nbs/folder).glob("*.ipynb"))]
    out = ["index.ipynb"]
    for title, folder in GUIDES.items(): out.append({"section": title, "contents": BEFORE.get(title, []) + found(folder)})
    out.append({"section": "Results", "contents": RESULTS + found("experiments")})
    modules = [{"section": about["title"], "contents": [str(p.relative_to(nbs)) for _, p in pages(room, root)]} for room, about in rooms(root).items()]
    return [*out, {"section": "Modules", "contents": ["architecture.ipynb", *modules]}]


def with_sidebar(text: str, contents: list) -> str:
    "A Quarto configuration with another sidebar; the rest of the file stays as it is written"
    lines = yaml.safe_dump(contents, sort_keys=False, allow_unicode=True).splitlines()
    head = text[:text.index("    contents:\n") + len("    contents:\n")]
    return head + "".join(f"      {line}\n" for line in lines)


def main(what: str = "write"):
    new = renamed()
    files = [p for p in [*ROOT.glob("nbs/**/*.ipynb"), *ROOT.glob("configs/**/README.md"), ROOT/"CONTRIBUTING.md"] if ".ipynb_checkpoints" not in p.parts]
    if what == "check":
        quarto = (ROOT/"_quarto.yml").read_text()
        stale = with_sidebar(quarto, sidebar()) != quarto
        for old, path in new.items(): print(f"{old.relative_to(ROOT)} should be {path.name}")
        if stale: print("_quarto.yml: the sidebar is not that of the pages")
        sys.exit(bool(new) or stale)
    for path in files:
        text = path.read_text()
        if (other := relink(text, path, new)) != text: path.write_text(other)
    for old, path in new.items(): old.rename(path.with_suffix(".moving"))
    for path in new.values(): path.with_suffix(".moving").rename(path)
    for old, path in new.items(): print(f"{old.relative_to(ROOT)} → {path.name}")
    quarto = ROOT/"_quarto.yml"
    quarto.write_text(with_sidebar(quarto.read_text(), sidebar()))


if __name__ == "__main__": main(*sys.argv[1:])
