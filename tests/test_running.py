"Studies that are killed anywhere, continued, rerun, reused; runs that end in every way there is."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fake_studies import ended, fake_study, launch, until
from test_ablation import BASE, STUDY, write_study
from peer_nb.running import command as runner
from peer_nb.study.plan import load_plan
from peer_nb.study.run import Run, process_mark
from peer_nb.study.study import load_study
from peer_nb.running.watch import look_at
from peer_nb.findings.results import load_runs
from peer_nb.files import read_json, read_jsonl, write_json

VICTIMS = ("runner", "run")
REPORT = Path(__file__).parent/"kill_report.json"
NUMBERS = ["run", "heads", "seed", "state", "words/bits_per_byte", "words/loss", "tokens", "parameters"]


def table(folder: Path) -> pd.DataFrame: return pd.read_csv(folder/"ablation_results.csv")[NUMBERS]


def the_folder(work: Path) -> Path:
    folder, = (work/"out").iterdir()
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The same study, left alone"
    work = fake_study(tmp_path_factory.mktemp("undisturbed"), seeds=[1, 2])
    code, out = ended(launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, FAKE_STEP=0))
    assert code == 0, out
    return work, the_folder(work)


def alive(folder: Path) -> list[int]:
    "Processes that work on the study"
    noted = [s["pid"] for p in folder.glob("runs/*/status.json") if (s := read_json(p)) and s["state"] == "RUNNING"] + [b["pid"] for b in read_jsonl(folder/"begun.jsonl")]
    return [pid for pid in {*noted} if process_mark(pid)]


def kill_one(folder: Path, process: subprocess.Popen, victim: str) -> bool:
    "kill -9 of the runner or of a run; whether there was one"
    pids = [process.pid] if victim == "runner" else alive(folder)
    if not pids or process.poll() is not None: return False
    try: os.kill(random.choice(pids), signal.SIGKILL)
    except ProcessLookupError: return False
    return True


def whole(path: Path, runs: int) -> bool:
    "Whether a table is not torn: a row for each run"
    return not path.exists() or (len(frame := pd.read_csv(path)) == runs and frame.run.notna().all())


def starts(folder: Path) -> dict[str, int]:
    "Run: how often its notebook has begun"
    begun = [r["run"] for r in read_jsonl(folder/"begun.jsonl")]
    return {c.id: begun.count(c.id) for c in load_plan(folder).cells}


class Campaign:
    "A study that is started, killed once at a random instant, continued, killed..., and what was hit"
    def __init__(self, work: Path, seed: int, pause: float):
        self.work, self.rng, self.pause, self.hits, self.misses, self.done = work, random.Random(seed), pause, [], 0, {}
        self.words = ["--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, "--resume", "--retry-failed"]

    def round(self, victim: str):
        process = launch(*self.words, FAKE_STEP=self.pause)
        until(lambda: [*(self.work/"out").glob("*/plan.json")] or process.poll() is not None)
        folder = self.folder = the_folder(self.work)
        before = sum(starts(folder).values())
        if victim != "runner": until(lambda: sum(starts(folder).values()) > before or process.poll() is not None)
        delay = self.rng.uniform(0, 6 if victim == "runner" else 2.5)
        time.sleep(delay)
        if kill_one(folder, process, victim): self.hits.append(dict(victim=victim, after=round(delay, 2), runs_done=len(self.done)))
        else: self.misses += 1
        if process.poll() is None and victim != "runner": process.send_signal(signal.SIGINT)
        ended(process)
        self.check()

    def check(self):
        "Nothing lives on, the table is whole, and what was done has not begun again"
        until(lambda: not alive(self.folder))
        plan, count = load_plan(self.folder), starts(self.folder)
        assert whole(self.folder/"ablation_results.csv", len(plan.cells))
        assert {r: count[r] for r in self.done} == self.done, "a run that was done was made again"
        self.done = {c.id: count[c.id] for c in plan.cells if Run(self.folder/"runs"/c.id).state == "DONE"}
        if len(self.done) == len(plan.cells): self.forget(self.rng.choice([*self.done]))

    def forget(self, run: str):
        "Kills are left, and no run to be killed: make one anew"
        runner.set_aside(self.folder, load_plan(self.folder), [run])
        del self.done[run]

    def finish(self, reference: Path):
        "Continue to the end: the same table as undisturbed, every step of every run in it"
        code, out = ended(launch(*self.words, FAKE_STEP=0))
        assert code == 0, out
        pd.testing.assert_frame_equal(table(self.folder), table(reference))
        for run in (self.folder/"runs").iterdir(): assert sorted({r["step"] for r in read_jsonl(run/"metrics.jsonl")}) == [*range(1, 11)]
        count = starts(self.folder)
        assert {r: count[r] for r in self.done} == self.done
        assert ended(launch(*self.words))[0] == 0 and starts(self.folder) == count


def test_killed_at_two_instants(undisturbed, tmp_path):
    "kill -9 of the runner and of runs: a later --resume ends with the undisturbed table"
    campaign = Campaign(fake_study(tmp_path, seeds=[1, 2]), seed=1, pause=0.2)
    for victim in ("runner", "run"): campaign.round(victim)
    campaign.finish(undisturbed[1])
    assert campaign.hits and campaign.misses < 2


@pytest.mark.slow
def test_killed_at_thirty_instants(undisturbed, tmp_path):
    campaign = Campaign(fake_study(tmp_path, seeds=[1, 2]), seed=2, pause=0.2)
    for n in range(90):
        if len(campaign.hits) >= 30: break
        campaign.round(VICTIMS[n % 2])
    campaign.finish(undisturbed[1])
    assert len(campaign.hits) >= 30 and {h["victim"] for h in campaign.hits} == {*VICTIMS}
    write_json(REPORT, dict(kills=len(campaign.hits), of={v: sum(h["victim"] == v for h in campaign.hits) for v in VICTIMS}, nobody_there=campaign.misses,
                            table="as undisturbed", torn_tables=0, runs_made_again_after_done=0, instants=campaign.hits))


@pytest.mark.slow
def test_the_real_trainer_is_killed_and_goes_on_to_the_bit(tmp_path):
    "kill -9 of a run that trains, once it has saved: the resumed run has the undisturbed run's numbers, every digit"
    base = json.loads(json.dumps(BASE)) | dict(eval_config=dict(max_tokens=500, eval_batch_size=4))
    base["train_config"] |= dict(max_tokens=64*300, save_steps=50, logging_steps=50, eval_steps=150, save_total_limit=1)
    base["model_config"]["vocab_size"] = 257
    study = dict(STUDY, name="real", notebook="train_and_evaluate", axes={"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}}})
    tables = []
    for name in ("undisturbed", "killed"):
        work = write_study(tmp_path/name, study, base)
        (work/"words.txt").write_text("".join(f"{n} and {n} is {2*n}\n\n" for n in range(600)))
        process = launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0)
        if name == "killed":
            run = until(lambda: [*(work/"out").glob("*/runs/001*/latest")] or process.poll() is not None, 300)[0].parent
            os.kill(read_json(run/"heartbeat.json")["pid"], signal.SIGKILL)
            code, out = ended(process)
            assert code == 1 and Run(run).state == "STALE", out
            process = launch("--resume", "--output-dir", work/"out")
        code, out = ended(process)
        assert code == 0, out
        tables.append(pd.read_csv(the_folder(work)/"ablation_results.csv"))
    assert "continuing from" in (run/"log.txt").read_text() and read_json(run/"status.json")["attempt"] == 2
    numbers = [c for c in tables[0] if "/" in c] + ["run", "state", "tokens", "parameters"]
    pd.testing.assert_frame_equal(tables[0][numbers], tables[1][numbers], check_exact=True)


@pytest.mark.slow
def test_a_run_that_diverges_has_failed_and_says_why(tmp_path):
    "The real trainer at a rate that no model survives: a FAILED row with the reason in table, page and log; the sane run beside it is DONE"
    base = json.loads(json.dumps(BASE)) | dict(eval_config=dict(max_tokens=500, eval_batch_size=4))
    base["train_config"] |= dict(max_tokens=64*40, save_steps=1000, eval_steps=1000)
    base["model_config"]["vocab_size"] = 257
    axes = {"rate": {"usual": {}, "wild": {"train_config.learning_rate": 1e25, "train_config.max_grad_norm": 1e30}}}
    work = write_study(tmp_path, dict(STUDY, name="wild", notebook="train_and_evaluate", axes=axes), base)
    (work/"words.txt").write_text("".join(f"{n} and {n} is {2*n}\n\n" for n in range(600)))
    code, out = ended(launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0))
    folder = the_folder(work)
    rows, wild = pd.read_csv(folder/"ablation_results.csv").set_index("rate"), next(folder.glob("runs/*wild*"))
    error = read_json(wild/"status.json")["error"]
    assert code == 1 and rows.state.to_dict() == {"usual": "DONE", "wild": "FAILED"}, out
    assert error["kind"] == rows.error_kind["wild"] == "not finite" and not (wild/"result.json").exists()
    assert pd.notna(rows["words/bits_per_byte"]["usual"]) and pd.isna(rows["words/bits_per_byte"]["wild"])
    assert "not finite" in out and "Traceback" not in out
    assert "not finite" in (folder/"index.html").read_text()


ENDINGS = {"asks": "import os; os._exit(75)", "torchrun": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; sys.exit(75)'], check=True)", "memory": "raise MemoryError('out')",
           "diverged": "raise FloatingPointError('the loss is not finite')", "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"}


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    "A study whose runs end in five ways"
    work = fake_study(tmp_path_factory.mktemp("endings"), seeds=[1], axes={"ends": {name: {"train_config.learning_rate": 0.001*(n + 1)} for n, name in enumerate(ENDINGS)}})
    book = json.loads((work/"template.ipynb").read_text())
    book["cells"][2]["source"] = f"ENDINGS = {ENDINGS!r}\nif not resume: exec(ENDINGS[levels['ends']])\n" + "".join(book["cells"][2]["source"])
    (work/"template.ipynb").write_text(json.dumps(book))
    said = ended(launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0))
    return work, the_folder(work), said


def test_every_way_to_end_has_its_state_and_kind(endings):
    _, folder, (code, out) = endings
    cells = load_plan(folder).cells
    status = {c.levels["ends"]: read_json(folder/"runs"/c.id/"status.json") for c in cells}
    assert code == 1 and {e: (s["state"], s.get("error", {}).get("kind")) for e, s in status.items()} == {
        "asks": ("DONE", None), "torchrun": ("DONE", None), "memory": ("FAILED", "out of memory"), "diverged": ("FAILED", "not finite"), "killed": ("STALE", "killed")}, out
    assert [status[e]["attempt"] for e in ENDINGS] == [2, 2, 1, 1, 1] and out.count("; it has saved, and goes on (1 of 3 times)") == 2, out   # exit code 75 asks for another start
    rows = pd.read_csv(folder/"ablation_results.csv").set_index("ends")
    assert rows.error_kind.dropna().to_dict() == {e: s["error"]["kind"] for e, s in status.items() if "error" in s}
    assert "FAILED" in out and "out of memory, MemoryError" in out
    assert look_at(load_runs(folder)).counts == {"DONE": 2, "FAILED": 2, "STALE": 1}


@pytest.mark.slow
def test_a_run_that_takes_too_long(tmp_path):
    "It is stopped at its limit, wherever it is, and FAILED: timeout; --retry-failed goes on"
    work = fake_study(tmp_path, seeds=[1], axes={"heads": {"four": {}}})
    code, out = ended(launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, "--time", 0.1, FAKE_STEP=5))
    status = read_json(next(the_folder(work).glob("runs/*/status.json")))
    assert code == 1 and "Timeout: ran longer than its time limit" in out and (status["state"], status["error"]["kind"]) == ("FAILED", "timeout"), out
    code, out = ended(launch("--resume", "--retry-failed", "--output-dir", work/"out", "--time", 10, FAKE_STEP=0))
    assert code == 0, out


@pytest.mark.slow
def test_what_is_taken_up_by_itself_and_what_on_request(endings, tmp_path):
    "--resume takes up what was killed; --retry-failed the rest; --rerun makes anew; DONE is left alone"
    work, folder, _ = endings
    folder = shutil.copytree(work/"out", tmp_path/"out")/folder.name   # the other test looks at how they ended
    code, out = ended(launch("--resume", "--output-dir", tmp_path/"out"))
    assert code == 1 and "1 of 5 runs to do" in out and look_at(load_runs(folder)).counts == {"DONE": 3, "FAILED": 2}, out
    code, out = ended(launch("--resume", "--retry-failed", "--output-dir", tmp_path/"out"))
    assert code == 0 and "2 of 5 runs to do" in out, out
    before = {p.parent.name: read_json(p) for p in folder.glob("runs/*/status.json")}
    assert {s["attempt"] for s in before.values()} == {2}
    code, out = ended(launch("--resume", "--rerun", 3, "--output-dir", tmp_path/"out"))
    after = {p.parent.name: read_json(p) for p in folder.glob("runs/*/status.json")}
    assert "1 of 5 runs to do" in out and [r for r in before if before[r] != after[r]] == [load_plan(folder).cells[2].id], out
    assert len([*(folder/"earlier").iterdir()]) == 1 and after[load_plan(folder).cells[2].id]["error"]["kind"] == "out of memory"


def test_a_second_study_takes_over_what_the_first_has(undisturbed, tmp_path):
    "Equal runs by hash, a declared one with its differences; the latter is in no paired test"
    work, folder = undisturbed
    study = yaml.safe_load((work/"study.yaml").read_text())
    study |= dict(name="second", seeds=[1, 7], reuse=[dict(cell={"heads": "two"}, seed=7, source=str(next(folder.glob("runs/003*"))), reason="too dear to make again")])
    (work/"second.yaml").write_text(yaml.safe_dump(study))
    code, out = ended(launch("--study", work/"second.yaml", "--output-dir", work/"out", "--gpus", 0, FAKE_STEP=0))
    second = next(f for f in (work/"out").iterdir() if f.name.startswith("second"))
    rows = pd.read_csv(second/"ablation_results.csv").set_index(["heads", "seed"])
    assert code == 0 and "1 of 4 runs to do" in out, out
    assert rows.state.to_dict() == {("four", 1): "REUSE", ("four", 7): "DONE", ("two", 1): "REUSE", ("two", 7): "REUSE"}
    assert rows.reuse_differs.dropna().to_dict() == {("two", 7): "train_config.seed: 1 there, 7 here"}
    first = table(folder).set_index(["heads", "seed"])
    assert rows.loc[("four", 1), "words/loss"] == first.loc[("four", 1), "words/loss"]
    assert (second/"runs"/rows.loc[("four", 1), "run"]/"report.html").exists()


def test_status_and_watch_from_another_shell(tmp_path):
    work = fake_study(tmp_path, seeds=[1])
    process = launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, "--parallel", 1, FAKE_STEP=0.8)
    folder = until(lambda: [*(work/"out").glob("*/plan.json")])[0].parent
    until(lambda: (read_json(next(iter(folder.glob("runs/*/heartbeat.json")), tmp_path/"no")) or {}).get("step", 0) >= 3)
    watcher = launch("watch", work/"out", "--every", 0.2)
    code, out = ended(launch("status", work/"out"))
    assert code == 0 and "RUNNING" in out and "100 tokens/s" in out and "█" in out and "left" in out, out
    assert ended(process)[0] == 0
    code, out = ended(watcher)
    assert code == 0 and "2 runs: 1 TODO, 1 RUNNING" in out.replace("1 RUNNING, 1 TODO", "1 TODO, 1 RUNNING") and "2 runs: 2 DONE" in out, out


@pytest.mark.parametrize("task", ["digit_lookup", "two_hop", "hashhop", "synthetic_qa"])
def test_the_slurm_studies_of_the_memory_tasks_are_sound(task, capsys, monkeypatch):
    "Each is planned whole by the command that it says it is started with"
    root = Path(__file__).parent.parent
    study = root/"configs"/"memory"/"slurm"/f"{task}.yaml"
    command = next(l.removeprefix("#").split() for l in study.read_text().splitlines() if "peer-ablate" in l)
    assert command[:4] == ["peer-ablate", "--study", f"configs/memory/slurm/{task}.yaml", "--launcher"]
    monkeypatch.chdir(root)
    assert runner.main([*command[1:], "--dry-run"]) == 0
    said = capsys.readouterr().out
    runs = len(load_study(study).seeds)*{"digit_lookup": 5, "hashhop": 4, "synthetic_qa": 7, "two_hop": 5}[task]
    assert f"{runs} runs" in said, said
