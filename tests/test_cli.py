"A program made of functions, as a person meets it: exit codes, one line for a mistake, never a traceback"
import contextlib
import io
import os
import re
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peer_nb
from peer_nb.cli import make_main

PROGRAM = '''
"A program with three commands"
import sys
import time
from pathlib import Path
from typing import Literal

from peer_nb.cli import make_main
from peer_nb.config import Config, apply_overrides
from peer_nb.files import UserError


def run(
    base_config: Path = Path("configs/config.yaml"), # configuration of the base
    output_dir: Path = Path("ablation_results"), # where studies are kept
    axes: list[Literal["data_mix", "expert_setup", "selection_heads"]] | None = None, # what is varied
    tokens: int | None = None, # tokens of each run
    gpus: int = 4, # GPUs of each run
    rate: float | None = None, # a number, which may be negative
    resume: bool = False, # go on with the newest study
    report: bool = True, # write the pages
    overrides: list[str] = (), # configuration keys
):
    """Run a study

    Every cell of the plan is one run.

    Examples:
      peer-ablate --tokens 5e9 train_config.seed=1
    """
    seed = apply_overrides(Config(), list(overrides)).train_config.seed
    print(repr((str(base_config), str(output_dir), axes, tokens, gpus, rate, resume, report, seed)))


def status(
    folder: Path, # the study
    deep: bool = False, # every run
):
    "Say how far a study is"
    if folder.name == "missing": raise UserError(f"{folder}: no such study")
    return 3


def hang_on():
    "Wait for ever"
    print("waiting", flush=True)
    time.sleep(60)


def bug():
    "Divide by zero"
    return 1/0


main = make_main("peer-ablate", dict(run=run, status=status, hang_on=hang_on, bug=bug), default="run", doc="Run ablation studies")
if __name__ == "__main__": sys.exit(main())
'''
BASE = ("configs/config.yaml", "ablation_results", None, None, 4, None, False, True, 42)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program")/"program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture(scope="module")
def main(program):
    namespace = {"__name__": "program", "__file__": str(program)}
    exec(compile(PROGRAM, str(program), "exec"), namespace)
    return namespace["main"]


def call(main, words) -> tuple[int, str, str]:
    "Exit code, output and errors of a command line in this process"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words.split() if isinstance(words, str) else words)
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("words, changes", [
    ("", {}),
    ("run", {}),
    ("--resume", {6: True}),
    ("run --no-resume --no-report", {7: False}),
    ("--base-config a.yaml --output-dir out", {0: "a.yaml", 1: "out"}),
    ("--base_config a.yaml --output_dir=out", {0: "a.yaml", 1: "out"}),
    ("run --axes data_mix expert_setup --gpus 0", {2: ["data_mix", "expert_setup"], 4: 0}),
    ("--axes data_mix --axes expert_setup", {2: ["data_mix", "expert_setup"]}),
    ("--axes data_mix train_config.seed=7 --gpus 1", {2: ["data_mix"], 4: 1, 8: 7}),
    ("--train-config.seed 7", {8: 7}),
    ("--train_config.seed=7 --axes data_mix", {2: ["data_mix"], 8: 7}),
    ("train-config.seed=7 train_config.seed=8", {8: 8}),
    ("--tokens 5e9", {3: 5_000_000_000}),
    ("--tokens=5_000_000", {3: 5_000_000}),
    ("--rate -1e-3", {5: -0.001}),
    ("--rate=-.5", {5: -0.5}),
    ("--output-dir -", {1: "-"}),
])
def test_grammar(main, words, changes):
    expected = tuple(changes.get(i, value) for i, value in enumerate(BASE))
    assert call(main, words) == (0, repr(expected) + "\n", "")


@pytest.mark.parametrize("words, message", [
    ("--tokens many", "--tokens: 'many' is not allowed; allowed: a whole number"),
    ("--tokens 2.5", "--tokens: '2.5' is not allowed; allowed: a whole number"),
    ("--axes data_mx", "--axes: 'data_mx' is not allowed; allowed: data_mix | expert_setup | selection_heads; did you mean data_mix?"),
    ("--axes", "--axes needs a value: what is varied"),
    ("--gpus", "--gpus needs a value: GPUs of each run"),
    ("--gpu 1", "unknown option --gpu; did you mean --gpus?"),
    ("--resume=yes", "--resume is a switch and takes no value; write --resume or --no-resume"),
    ("train_config.sed=1", "override: train_config.sed: unknown key; did you mean seed?"),
    ("--train-config.seed", "--train-config.seed needs a value"),
    ("--train-config.seed many", "override: train_config.seed: 'many' is not allowed; allowed: a whole number from 0 to 4294967295"),
    ("seed=1", "not understood: seed=1; configuration keys are written section.key=value"),
    ("statsu out", "unknown command statsu; did you mean status?"),
    ("frobnicate", "unknown command frobnicate; known: run, status, hang_on, bug"),
    ("run more", "not understood: more; no word stands without an option; --help shows the options"),
    ("status", "FOLDER is missing: the study"),
    ("status a b", "not understood: b; only FOLDER stands without an option; --help shows the options"),
    ("status a train_config.seed=1", "not understood: train_config.seed=1; configuration keys are written section.key=value"),
    ("status missing", "missing: no such study"),
    ("status --train-config.seed 1", "unknown option --train-config.seed; known: --folder, --deep, --no-deep, --help, --version"),
])
def test_mistakes_are_one_line(main, words, message):
    assert call(main, words) == (2, "", f"peer-ablate: error: {message}\n")


@pytest.mark.parametrize("words, option", [("--resume study", "--output-dir study"), ("--tokens 5 base.yaml", "--base-config base.yaml"), ("--resume study --gpus 0", "--output-dir study")])
def test_a_path_that_stands_alone_is_told_its_option(main, words, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"study").mkdir()
    (tmp_path/"base.yaml").write_text("")
    assert call(main, words) == (2, "", f"peer-ablate: error: not understood: {option.split()[1]}; did you mean {option}?\n")


def test_commands_and_exit_codes(main):
    assert call(main, "status out") == (3, "", "")
    assert call(main, "status --folder out --deep") == (3, "", "")
    with pytest.raises(ZeroDivisionError): call(main, "bug")


def test_help_teaches(main):
    code, text, errors = call(main, "--help")
    assert (code, errors) == (0, "")
    flat = " ".join(text.split())   # whatever the width of the terminal
    for part in ("Run ablation studies", "usage: peer-ablate [COMMAND] ...", "status Say how far a study is", "run Run a study (the default)",
                 "--base-config PATH configuration of the base (default: configs/config.yaml)", "--gpus N GPUs of each run (default: 4)",
                 "--axes data_mix|expert_setup|selection_heads ...", "what is varied", "--resume go on with the newest study", "--no-report write the pages",
                 "section.key=value", "Examples: peer-ablate --tokens 5e9 train_config.seed=1"):
        assert part in flat, part
    assert call(main, "run --help") == call(main, "run --gpus 3 -h")
    code, text, _ = call(main, "status --help")
    assert code == 0 and text.startswith("Say how far a study is\n\nusage: peer-ablate status FOLDER [options]\n")


@pytest.mark.parametrize("width", [20, 60, 200])
def test_help_fits_the_terminal(main, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert all(line == line.rstrip() for line in call(main, "--help")[1].splitlines())


@pytest.mark.parametrize("words", ["--version", "run --version", "status --version"])
def test_version(main, words):
    assert call(main, words) == (0, f"peer-ablate peer_nb {peer_nb.__version__}\n", "")


words = st.sampled_from("run status --gpus --gpus=1 --axes data_mix --tokens 5 -1 -x --x=y --resume --no-resume a.b=c --a.b --a.b=c = -- - --= train_config.seed=1 . --. ü".split())


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(words | st.text(max_size=6), max_size=5))
def test_any_command_line_ends_well(main, line):
    code, out, err = call(main, line)
    assert code in (0, 2, 3)
    assert (code == 2) == err.startswith("peer-ablate: error: ")
    assert code != 2 or not out


def test_one_function_without_a_name():
    def square(number: int):   # no comment
        "Square a number"
        return number**2
    assert make_main("square", square)(["3"]) == 9
    assert call(make_main("square", square), "three")[2] == "square: error: --number: 'three' is not allowed; allowed: a whole number\n"


# ---- as a process -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, code, stderr", [
    (["status", "out"], 3, r""), (["--help"], 0, r""), (["--gpu", "1"], 2, r"peer-ablate: error: unknown option --gpu; did you mean --gpus\?\n"),
    (["train_config.learning_rate=fast"], 2, r"peer-ablate: error: override: train_config\.learning_rate: 'fast' is not allowed; allowed: a number above 0\n"),
    (["bug"], 1, r"Traceback (.|\n)*ZeroDivisionError: division by zero\n")])
def test_process(program, words, code, stderr):
    done = subprocess.run([sys.executable, program, *words], capture_output=True, text=True)
    assert done.returncode == code
    assert re.fullmatch(stderr, done.stderr)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_interrupted(program):
    process = subprocess.Popen([sys.executable, program, "hang-on"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "peer-ablate: interrupted\n"
    assert process.returncode == 130


@pytest.mark.parametrize("words, code", [(["status", "missing"], 2), (["--no-such-option"], 2), (["--version"], 0), (["status", "there"], 3)])
def test_nothing_can_be_said_on_a_full_disk_and_the_code_is_right(words, code, program):
    "Where messages go there is no room: words are lost, not the exit code"
    with open("/dev/full", "w") as full: assert subprocess.run([sys.executable, program, *words], stdout=full, stderr=full).returncode == code
