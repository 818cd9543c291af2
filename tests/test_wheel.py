"The wheel that is built runs peer-ablate from a clean environment, outside the checkout."
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder/"source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if not (ROOT/name).is_file(): continue
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        (source/name).write_bytes((ROOT/name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    "An environment with the wheel, and the dependencies of this one by path; this checkout is not on it"
    folder = tmp_path_factory.mktemp("clean")/"env"
    venv.create(folder, with_pip=False)
    home = next(folder.glob("lib/python*/site-packages"))
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder/"bin"/"python", "install", "--quiet", "--no-deps", wheel], check=True)
    shared = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    (home/"dependencies.pth").write_text("\n".join(shared) + "\n")   # plain paths: their own .pth files are not followed
    return folder


def run(env: Path, *args, cwd: Path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PEER_NB", "VIRTUAL"))}
    return subprocess.run([str(env/"bin"/args[0]), *map(str, args[1:])], cwd=cwd, capture_output=True, text=True, env=clean)


def test_wheel_holds_package_and_templates(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "peer_nb/running/command.py" in names and {f"peer_nb/experiments/{name}.ipynb" for name in ("train_and_evaluate", "memory")} <= {*names}
    assert not [n for n in names if n.startswith(("tests/", "nbs/"))]


def test_the_package_comes_from_the_wheel(clean, tmp_path):
    done = run(clean, "python", "-c", "import peer_nb; print(peer_nb.__file__)", cwd=tmp_path)
    assert str(clean) in done.stdout, done.stderr


def test_every_command_has_help(clean, tmp_path):
    for command in sorted(p.name for p in (clean/"bin").glob("peer-*")):
        done = run(clean, command, "--help", cwd=tmp_path)
        assert done.returncode == 0 and "--" in done.stdout, f"{command}: {done.stderr}"


@pytest.mark.slow
def test_a_study_runs_outside_the_checkout(clean, tmp_path):
    "One tiny cell, with the template out of the wheel"
    text = (ROOT/"configs"/"demo.yaml").read_text()
    (tmp_path/"base.yaml").write_text(text)
    done = run(clean, "peer-ablate", "--base-config", "base.yaml", "--axes", "expert_setup", "--tokens", "4096", "--gpus", "0", "--output-dir", "out",
               "model_config.peer_config.num_experts=64", "model_config.peer_config.product_key_dim=[8,8]", "model_config.num_hidden_layers=1",
               "eval_config.max_tokens=2000", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    study = next((tmp_path/"out").iterdir())
    assert (study/"index.html").exists() and "DONE" in (study/"ablation_results.csv").read_text()
