"The package is what the notebooks export: no hand edits, no stray modules, no uncleaned notebooks."
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent


def nbdev(tool: str, folder: Path):
    "Run one of nbdev's tools in a copy of the project"
    script = f"from nbdev.export import nb_export; from nbdev.cli import *; from nbdev.clean import *; from nbdev.doclinks import nbdev_export; {tool}()"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The notebooks alone, exported afresh"
    folder = tmp_path_factory.mktemp("sync")
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_proc"))
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT/name, folder)
    (folder/"peer_nb").mkdir()
    nbdev("nbdev_export", folder)
    return folder


def modules(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted((folder/"peer_nb").rglob("*.py"))}


def test_package_is_what_the_notebooks_export(copy):
    fresh, here = modules(copy), modules(ROOT)
    stray = sorted(set(here) - set(fresh))
    missing = sorted(set(fresh) - set(here))
    edited = [name for name in fresh if name in here and fresh[name] != here[name]]
    assert not stray, f"no notebook exports {stray}: delete them, or write their notebook"
    assert not missing, f"not exported yet: {missing}; run make export"
    assert not edited, f"{edited} differ from their notebooks: edit the notebook, then make export"


def test_a_hand_edit_is_caught(copy, tmp_path):
    shutil.copytree(ROOT/"peer_nb", tmp_path/"peer_nb", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path/"peer_nb"/"config.py").open("a") as f: f.write("\nEDITED = True\n")
    (tmp_path/"peer_nb"/"stray.py").write_text("")
    here, fresh = modules(tmp_path), modules(copy)
    assert set(here) - set(fresh) == {"peer_nb/stray.py"}
    assert [name for name in fresh if fresh[name] != here[name]] == ["peer_nb/config.py"]


def test_notebooks_are_clean(copy):
    before = {p: p.read_bytes() for p in (copy/"nbs").rglob("*.ipynb")}
    nbdev("nbdev_clean", copy)
    dirty = [str(p.relative_to(copy)) for p, old in before.items() if p.read_bytes() != old]
    assert not dirty, f"execution counts or metadata in {dirty}; run make export"


def test_notebooks_are_valid():
    for path in (ROOT/"nbs").rglob("*.ipynb"): nbformat.validate(nbformat.read(path, as_version=4))
