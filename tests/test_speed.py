"Budgets of equal wall time: real trainings are timed for some steps, their speed decides how long a run trains, nothing is timed twice, and the page says how far off it was."
import json
import os
import re
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from fake_studies import TEMPLATE, launch, until
from test_ablation import BASE, STUDY, call, write_study

from peer_nb.running import speed
from peer_nb.study.plan import load_plan
from peer_nb.files import read_json

AXES = {"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}}}
BUDGET = dict(matched="wall_time", seconds=3)


def clocked_study(folder: Path, **changes) -> Path:
    "A study whose configurations can really be trained, of runs that only seem to be"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"words.jsonl").write_text("".join(json.dumps({"text": f"{a} plus {b} is {a + b}. " * 3}) + "\n" for a in range(12) for b in range(12)))
    data = {**BASE["dataset_config"], "datasets": [dict(name="words", path=str(folder/"words.jsonl"))]}
    return write_study(folder, {**STUDY, "axes": AXES, "budget": BUDGET, **changes}, {**BASE, "dataset_config": data}, TEMPLATE)


@pytest.fixture
def quick(tmp_path, monkeypatch) -> list:
    "Caches of this test alone, a short look at each training, and the trainings that were started"
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("PEER_NB_REGISTER", str(tmp_path/"register"))
    monkeypatch.setenv("FAKE_STEP", "0")
    monkeypatch.setattr(speed, "SECONDS", 0.2)
    started, start = [], speed.start_pilot
    monkeypatch.setattr(speed, "start_pilot", lambda *given: started.append(start(*given)) or started[-1])
    return started


def only(place: Path) -> Path:
    folder, = place.iterdir()
    return folder


@pytest.mark.slow
def test_tokens_follow_from_measured_speeds(quick, tmp_path, capsys):
    "Two real configurations are timed; the arithmetic again by hand from plan.json; a second study times nothing and takes the runs over"
    work = clocked_study(tmp_path/"work")
    ask = ["--study", work/"study.yaml", "--gpus", 0, "--parallel", 1, "--output-dir"]
    code, _, err = call(capsys, "plan", *ask[:4], "--parallel", 1)
    assert code == 2 and f"{work}/study.yaml, line " in err and "--measure times them now" in err and not quick
    code, out, err = call(capsys, "plan", *ask[:4], "--parallel", 1, "--measure")
    assert code == 0 and "timing 2 configurations, 1 at a time, for the budget of 3 s of training" in out and "timed 2 of 2: heads 'two': " in out, out + err
    assert "budget: equal wall time, 3 s of training each, from the measured speed of 2 configurations" in out and len(quick) == 2
    code, out, err = call(capsys, *ask, work/"out")
    folder = only(work/"out")
    assert code == 0 and len(quick) == 2 and "timing" not in out, "the run uses what the plan has measured" + out + err
    assert all(p.process.returncode == -signal.SIGKILL for p in quick) and not any(p.run.folder.exists() for p in quick)

    plan, beside = load_plan(folder), read_json(folder/"plan.json")["speeds"]
    assert beside["machine"]["at_once"] == 1 and beside["machine"]["gpus"] == 0 and beside["machine"]["device"]
    tokens = {c.id: c.tokens for c in plan.cells}
    assert {run: max(1, round(3*m["tokens_per_second"]/64))*64 for m in beside["measured"] for run in m["cells"]} == tokens
    assert [len(m["cells"]) for m in beside["measured"]] == [1, 1] and all(m["steps"] >= speed.STEPS and m["seconds"] >= 0.2 and m["tokens_per_second"] > 0 for m in beside["measured"])
    assert all(plan.config(c).train_config.max_tokens == c.tokens and plan.config(c).train_config.max_steps is None for c in plan.cells)

    rows = pd.read_csv(folder/"ablation_results.csv")
    assert rows.budget_seconds.tolist() == [3]*2 and rows.budget_missed.round(6).tolist() == [-0.5]*2      # the template says 1.5 s
    assert "3 s of training were planned for every run; 2 runs took 1.5 to 1.5 s (−50.0 % to −50.0 %); 2 of 2 combinations missed by more than 5 %." in out
    page = (folder/"index.html").read_text()
    assert "seconds of training" in page and "missed by more than 5 %" in page

    code, out, err = call(capsys, "plan", *ask, work/"again")
    assert code == 0 and len(quick) == 2 and f"reuse: 2 from {folder}\n" in out, out + err
    code, out, err = call(capsys, "--resume", "--study", work/"study.yaml", "--output-dir", work/"out")
    assert code == 0 and len(quick) == 2, out + err
    code, out, err = call(capsys, "plan", *ask[:4], "--parallel", 2, "--output-dir", work/"out")
    assert code == 0 and "estimated from the operations per second of finished runs for 2 of 2 configurations; `run` times them first" in out and len(quick) == 2, out + err


def test_an_interrupted_timing_leaves_nothing(quick, tmp_path, capsys, monkeypatch):
    "Ctrl-C while a training is watched: it is stopped, and no study is made"
    work = clocked_study(tmp_path/"work", axes={"heads": {"four": {}}})
    def interrupted(pilots):
        until(lambda: pilots[0].run.path("heartbeat").exists())
        raise KeyboardInterrupt
    monkeypatch.setattr(speed, "watch_pilots", interrupted)
    code, out, err = call(capsys, "--study", work/"study.yaml", "--gpus", 0, "--parallel", 1, "--output-dir", work/"out")
    pilot, = quick
    assert code == 130 and "timing 1 configuration" in out and not (work/"out").exists() and pilot.process.returncode == -signal.SIGKILL and not pilot.run.folder.exists(), out + err


def test_what_cannot_train_cannot_be_timed(quick, tmp_path, capsys):
    "The training's own words, one line, nothing made"
    work = write_study(tmp_path/"work", {**STUDY, "axes": {"heads": AXES["heads"]}, "budget": BUDGET}, BASE, TEMPLATE)   # a single document, which is held out
    code, out, err = call(capsys, "--study", work/"study.yaml", "--gpus", 0, "--parallel", 1, "--output-dir", work/"out")
    assert code == 2 and "a configuration cannot be timed, its training ended" in err and "no text to train on" in err and err.count("\n") == 1 and not (work/"out").exists(), out + err


def trainings(mark: str) -> list[int]:
    "Processes that train below a folder"
    def words(pid):
        try: return Path(f"/proc/{pid}/cmdline").read_text()
        except OSError: return ""
    return [int(p) for p in os.listdir("/proc") if p.isdigit() and mark in (said := words(p)) and "training.loop" in said]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_killed_plan_leaves_no_training_behind(tmp_path):
    work = clocked_study(tmp_path/"work", axes={"heads": {"four": {}}})
    (tmp_path/"tmp").mkdir()
    process = launch("plan", "--study", work/"study.yaml", "--gpus", 0, "--parallel", 1, "--output-dir", work/"out", "--measure", TMPDIR=tmp_path/"tmp", PEER_NB_CACHE=tmp_path/"cache")
    until(lambda: trainings(str(tmp_path)))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    until(lambda: not trainings(str(tmp_path)))
    time.sleep(0.2)
    assert not trainings(str(tmp_path))


@pytest.mark.parametrize("words, budget, said", [(["--measure"], dict(tokens=640), "--measure times configurations for a new study whose budget matches wall_time"), (["--measure"], {**BUDGET, "flops_per_second": 1e9}, r"line \d+: budget.flops_per_second states the device's speed"),
                                                 (["--measure", "--launcher", "slurm"], BUDGET, "--measure times configurations on this machine")])
def test_measuring_where_it_has_no_sense(words, budget, said, tmp_path, capsys):
    work = clocked_study(tmp_path, budget=budget)
    code, out, err = call(capsys, "--study", work/"study.yaml", "--gpus", 0, "--output-dir", work/"out", "--dry-run", *words)
    assert code == 2 and re.search(said, err) and err.count("\n") == 1 and not (work/"out").exists(), err


def test_a_stated_speed_is_believed(tmp_path, capsys):
    work = clocked_study(tmp_path, budget={**BUDGET, "flops_per_second": 1e9})
    code, out, err = call(capsys, "plan", "--study", work/"study.yaml", "--gpus", 0, "--output-dir", work/"out")
    assert code == 0 and "at the operations per second that the study states" in out and "3 s of training each" in out, out + err
