"""A home of their own for tests: what a person keeps (studies, caches, settings of Jupyter or matplotlib) is neither read nor written.

    python tests/own_home.py COMMAND…      run a command in a new home, which is gone afterwards
"""
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PLACES = ("HF_", "HUGGINGFACE_", "IPYTHON", "JUPYTER", "MPL", "PEER_NB_", "TORCHINDUCTOR_", "TORCH_HOME", "TRANSFORMERS_", "TRITON_CACHE", "TRITON_HOME", "WANDB_", "XDG_")
ASKED = {"PEER_NB_DATA"}   # benchmark items, which a person names for the tests
MARK = "HOME_OF_TESTS"     # set by a process that has such a home, for its children
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def environment(home: Path) -> dict[str, str]:
    "The variables of this process, but for those that say where programs keep what is a person's"
    kept = {name: value for name, value in os.environ.items() if name in ASKED or not name.startswith(PLACES)}
    return kept | OFFLINE | {"HOME": str(home), MARK: str(home), "TORCHINDUCTOR_CACHE_DIR": str(home/".cache"/"inductor")}


def main(*command: str) -> int:
    if not command: sys.exit(__doc__)
    for name in ("SIGINT", "SIGHUP"): signal.signal(getattr(signal, name), signal.SIG_DFL)   # a shell's & or nohup ignores them; tests send them
    with tempfile.TemporaryDirectory(prefix="home-") as home: return subprocess.run(command, env=environment(Path(home))).returncode


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
