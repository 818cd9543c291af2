"Flags of the test suite (what is slow or needs a GPU runs when it is asked for), its order, and a home of its own."
import itertools
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import own_home
import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long campaigns too (make test-full)")
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device, and the kernels' tests on it instead of in the interpreter")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in a random order")


def pytest_configure(config):
    config.home = None
    if own_home.MARK not in os.environ:   # else make, or the process that starts those of pytest-xdist, has made one
        config.home = tempfile.mkdtemp(prefix="home-")
        own = own_home.environment(Path(config.home))
        os.environ.clear()
        os.environ.update(own)
    if not config.getoption("--gpu"): os.environ.setdefault("TRITON_INTERPRET", "1")    # read when the kernels are imported
    config.addinivalue_line("markers", "slow: a long campaign, run by make test-full")
    config.addinivalue_line("markers", "gpu: needs a CUDA device, run with --gpu")


def pytest_unconfigure(config):
    if config.home: shutil.rmtree(config.home, ignore_errors=True)


def pytest_collection_modifyitems(config, items):
    for flag, reason in {"slow": "a long campaign: make test-full, or --slow", "gpu": "needs a CUDA device: --gpu"}.items():
        if config.getoption("--" + flag): continue
        skip = pytest.mark.skip(reason=reason)
        for item in items:
            if flag in item.keywords: item.add_marker(skip)
    if (seed := config.getoption("--shuffle")) is not None:
        chance, places = random.Random(seed), {}
        for item in items: places.setdefault(item.path, chance.random())
        items.sort(key=lambda item: (places[item.path], chance.random()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    "What a test draws without a seed of its own does not depend on the tests before it"
    random.seed(0)
    if "numpy" in sys.modules: sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules: sys.modules["torch"].manual_seed(0)


REGISTERS = itertools.count()


def own_register():
    "No study of another test is found, and taken over instead of computed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEER_NB_REGISTER", str(Path.home()/"registers"/f"{os.getpid()}-{next(REGISTERS)}"))
        yield


register_of_module = pytest.fixture(own_register, autouse=True, scope="module")
register_of_test = pytest.fixture(own_register, autouse=True)
