"Flags of the test suite: what is slow, or needs a GPU, runs when it is asked for."
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the long campaigns too (make test-full)")
    parser.addoption("--gpu", action="store_true", help="run the tests that need a CUDA device, and the kernels' tests on it instead of in the interpreter")


def pytest_configure(config):
    config.register_of_studies = tempfile.mkdtemp(prefix="studies-")     # neither do tests find a person's studies, nor later studies the tests'
    os.environ["PEER_NB_REGISTER"] = config.register_of_studies
    if not config.getoption("--gpu"): os.environ.setdefault("TRITON_INTERPRET", "1")    # read when the kernels are imported
    config.addinivalue_line("markers", "slow: a long campaign, run by make test-full")
    config.addinivalue_line("markers", "gpu: needs a CUDA device, run with --gpu")


def pytest_collection_modifyitems(config, items):
    for flag, reason in {"slow": "a long campaign: make test-full, or --slow", "gpu": "needs a CUDA device: --gpu"}.items():
        if config.getoption("--" + flag): continue
        skip = pytest.mark.skip(reason=reason)
        for item in items:
            if flag in item.keywords: item.add_marker(skip)


def pytest_unconfigure(config):
    shutil.rmtree(config.register_of_studies, ignore_errors=True)
