"Imports go down the house or sideways without a circle, never up."
import ast
import json
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import house
import pytest

PACKAGE = Path(__file__).parent.parent/"peer_nb"
FLOORS = house.floors()
MODEL_NEEDS = {"torch", "numpy", "transformers", "fastcore"}
LAB = ("study", "findings", "running")
LAB_CALLS = {*LAB, *(name for name, floor in FLOORS.items() if floor == 0), "analysis.parameters", "analysis.step_memory", "data.corpora", "models.options", "tasks.registry",
             "training.bases", "training.loop"}   # a base that is made in a process of its own; peer-train hands a plain configuration on


def imports(source: str, module: str) -> list[str]:
    "Absolute names of all that a module imports, inside functions too"
    found, package = [], module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            stem = ".".join(base + ([node.module] if node.module else []))
            found += [f"{stem}.{a.name}" for a in node.names]
    return found


def graph() -> dict[str, list[str]]:
    "module -> what it imports, names relative to peer_nb"
    files = [p for p in PACKAGE.rglob("*.py") if not p.name.startswith("_")]
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): imports(p.read_text(), "peer_nb." + ".".join(p.relative_to(PACKAGE).with_suffix("").parts))
            for p in files}


def inside(names: list[str], modules) -> set[str]:
    "The modules of the package among imported names"
    own = [n.removeprefix("peer_nb.") for n in names if n.startswith("peer_nb.")]
    return {max((m for m in modules if n == m or n.startswith(m + ".")), key=len, default=n) for n in own}


MODULES = graph()


def test_every_room_has_a_floor():
    assert {m.split(".")[0] for m in MODULES} <= set(FLOORS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_import_goes_up(module):
    floor = FLOORS[module.split(".")[0]]
    up = [n for n in inside(MODULES[module], MODULES) if n not in {"__version__"} and FLOORS[n.split(".")[0]] > floor]
    assert not up, f"{module} (floor {floor}) imports {up} from above"


def test_no_circles():
    try: list(TopologicalSorter({m: inside(names, MODULES) - {m} for m, names in MODULES.items()}).static_order())
    except CycleError as e: raise AssertionError(f"a circle of imports: {' -> '.join(e.args[1])}") from None


def test_models_can_be_copied_to_any_gpu_machine():
    for module, names in MODULES.items():
        if not module.startswith("models."): continue
        outside = {n.split(".")[0] for n in names} - set(__import__("sys").stdlib_module_names) - {"peer_nb", "triton"}
        assert outside <= MODEL_NEEDS, f"{module} imports {outside - MODEL_NEEDS}"
        assert all(n.startswith("models.") for n in inside(names, MODULES)), f"{module} imports another room"


def test_the_lab_knows_configurations_and_files_only():
    for module, names in MODULES.items():
        if module.partition(".")[0] not in LAB: continue
        foreign = {n for n in inside(names, MODULES) if n not in LAB_CALLS and n.split(".")[0] not in LAB_CALLS and n != "__version__"}
        assert not foreign, f"{module} imports {foreign}"


def test_an_error_of_the_users_has_one_address():
    "UserError is imported from files, where it is defined, and ConfigError from config, which shows all of the schema"
    for module, names in MODULES.items():
        wrong = [n for n in names if n.endswith((".UserError", ".ConfigError")) and n not in ("peer_nb.files.UserError", "peer_nb.config.ConfigError")]
        if module == "config": wrong = [n for n in wrong if n != "peer_nb.schema.ConfigError"]
        assert not wrong, f"{module} imports {wrong}"


def test_the_test_sees_an_import_that_goes_up():
    names = imports("def f():\n    from peer_nb.training.loop import train\nfrom ..study import plan", "peer_nb.models.mla")
    assert set(names) == {"peer_nb.study.plan", "peer_nb.training.loop.train"}
    assert inside(names, ["training.loop", "study.plan"]) == {"training.loop", "study.plan"}


def test_pages_are_read_in_the_order_of_their_numbers():
    wrong = {old.name: new.name for old, new in house.renamed().items()}
    assert not wrong, f"a page imports a later one of its room, or numbers have gaps: {wrong}; run make renumber"
    quarto = (house.ROOT/"_quarto.yml").read_text()
    assert house.with_sidebar(quarto, house.sidebar()) == quarto, "the sidebar is not that of the pages; run make renumber"


def test_a_page_that_imports_a_later_one_moves_and_its_links_follow(tmp_path):
    def page(name, module, *needs):
        cells = [f"#| default_exp {module}", "#| export\n" + "\n".join(f"from peer_nb.{m} import x" for m in needs)]
        path = tmp_path/"nbs"/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(cells=[dict(cell_type="code", source=[c]) for c in cells])))
    page("room/00_a.ipynb", "room.a", "room.b", "files")
    page("room/03_b.ipynb", "room.b")
    page("00_files.ipynb", "files")
    (tmp_path/"nbs"/"house.yaml").write_text("ground: {title: Ground, floor: 0}\nroom: {title: Room, floor: 1}\n")
    new = {old.name: to.name for old, to in house.renamed(tmp_path).items()}
    assert new == {"03_b.ipynb": "00_b.ipynb", "00_a.ipynb": "01_a.ipynb"}
    text = house.relink("[a](room/00_a.ipynb#x) [f](00_files.ipynb)", tmp_path/"nbs"/"index.ipynb", house.renamed(tmp_path))
    assert text == "[a](room/01_a.ipynb#x) [f](00_files.ipynb)"
    assert house.floors(tmp_path) == {"files": 0, "room": 1}
