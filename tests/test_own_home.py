"Tests and their children live in a home of their own: a person's studies aren't found, and nothing of theirs is written."
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peer_nb.files import write_json

ROOT = Path(__file__).parent.parent
LOOK = '''
from pathlib import Path
from peer_nb.files import cache_folder, write_json
from peer_nb.running.register import registered
import matplotlib, huggingface_hub.constants, jupyter_core.paths, IPython.paths
print("found", len(registered()))
for place in (Path.home(), cache_folder(), matplotlib.get_cachedir(), matplotlib.get_configdir(), huggingface_hub.constants.HF_HOME, IPython.paths.get_ipython_dir(),
              jupyter_core.paths.jupyter_config_dir(), jupyter_core.paths.jupyter_data_dir(), jupyter_core.paths.jupyter_runtime_dir()): print("place", place)
write_json(cache_folder()/"left.json", {})
'''
TESTS = f"import subprocess, sys\nLOOK = {LOOK!r}\n" + '''
def test_here(): exec(LOOK, {})
def test_in_a_child(): print(subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout)
'''
PYTEST = ["-m", "pytest", "test_look.py", "-rP", "-p", "conftest", "-p", "no:cacheprovider"]
WAYS = {"the person": ["-c", LOOK], "own_home.py": [str(ROOT/"tests"/"own_home.py"), sys.executable, "-c", LOOK], "pytest": PYTEST, "pytest -n 2": [*PYTEST, "-n", "2"]}
NAMED = {"PEER_NB_REGISTER": ".cache/peer_nb/studies", "PEER_NB_CACHE": ".cache/own", "XDG_CACHE_HOME": ".cache/shared", "XDG_CONFIG_HOME": "config", "XDG_DATA_HOME": "data",
         "HF_HOME": "hub", "MPLCONFIGDIR": "matplotlib", "IPYTHONDIR": "ipython", "JUPYTER_CONFIG_DIR": "j1", "JUPYTER_DATA_DIR": "j2", "JUPYTER_RUNTIME_DIR": "j3"}


def files(folder: Path) -> dict[Path, bytes]: return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("way, named", [("the person", {}), ("the person", NAMED), ("own_home.py", NAMED), pytest.param("pytest", NAMED, marks=pytest.mark.slow), ("pytest -n 2", {})])
def test_a_persons_study_is_found_by_the_person_alone(tmp_path, way, named):
    "A marker study stands in the register of a made-up person, whose folders follow from the home or are named by variables"
    home, study = tmp_path/"person", tmp_path/"out"/"marker"
    register = home/".cache"/"peer_nb"/"studies"
    for folder in (register, study): folder.mkdir(parents=True)
    write_json(study/"plan.json", {})
    write_json(register/"marker.json", dict(schema=1, folder=str(study), runs="0123456789abcdef"))
    (tmp_path/"test_look.py").write_text(TESTS)
    before = files(home)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT/'tests'}", "HOME": str(home)} | {name: str(home/path) for name, path in named.items()}
    done = subprocess.run([sys.executable, *WAYS[way]], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split() for line in done.stdout.splitlines() if line.startswith(("found ", "place "))]
    found, inside = {value for what, value in said if what == "found"}, {Path(value).is_relative_to(home) for what, value in said if what == "place"}
    if way == "the person": assert found == {"1"} and inside == {True} and files(home) != before
    else: assert found == {"0"} and inside == {False} and files(home) == before
