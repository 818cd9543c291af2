"Warm starts: the same numbers as cold ones, nothing handed from run to run, and what happens when servers die, age or are unfit."
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fake_studies import ended, fake_study, launch, server_of, until
from test_ablation import BASE, write_study
from peer_nb.running.local import Local, choose_devices, start
from peer_nb.study.plan import load_plan, make_plan, save_plan
from peer_nb.study.run import Run, process_mark
from peer_nb.study.study import Budget, Study
from peer_nb.running.warm import Warm
from peer_nb.config import load_config
from peer_nb.files import read_json

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux starts runs warm")

STATE = ['''
config_path: str = ""
run_dir: str = ""
levels: dict = {}
overrides: dict = {}
resume: bool = False
''', '''
import logging, os, random, resource, signal, statistics, sys, threading, warnings
import fastcore.imports, numpy, plotly.io, torch
from pathlib import Path
from peer_nb.files import write_json
''', '''
state = dict(
    mean=statistics.mean([1, 2]), linear=str(torch.nn.Linear.forward).split(" at ")[0], environment={k: v for k, v in os.environ.items() if not k.startswith("JPY_")}, folder=os.getcwd(), path=sys.path, threads=torch.get_num_threads(), kind=str(torch.get_default_dtype()),
    running=sorted(t.name for t in threading.enumerate() if "Thread" not in t.name and "-" not in t.name), started=sum("left" in t.name for t in threading.enumerate()), umask=(lambda old: os.umask(old) or old)(os.umask(0)),
    handlers=[str(signal.getsignal(n)).split(" at ")[0] for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM)], limit=resource.getrlimit(resource.RLIMIT_CORE), builtin="left" in vars(__builtins__),
    disabled=logging.root.manager.disable, colorsys=sys.modules.get("colorsys", 0) is None, filters=len(warnings.filters), leader=os.getsid(0) == os.getpid(), files=len(os.listdir("/proc/self/fd")),
    notebook=[fastcore.imports.IN_NOTEBOOK, plotly.io.renderers.default], deterministic=torch.are_deterministic_algorithms_enabled(), argv=[Path(w).stem for w in sys.argv[:1]], grad=torch.is_grad_enabled())
draws = [random.random(), numpy.random.rand(), torch.initial_seed(), torch.rand(1).item()]
''', '''
statistics.mean = lambda *_: "patched"
torch.nn.Linear.forward = None
os.environ["LEFT"] = "1"; os.environ.pop("HOME", None); os.chdir("/"); os.umask(0o077)
torch.set_num_threads(3); torch.set_default_dtype(torch.float64); torch.manual_seed(5); torch.use_deterministic_algorithms(True); torch.set_grad_enabled(False)
threading.Thread(target=lambda: threading.Event().wait(), name="left", daemon=True).start()
signal.signal(signal.SIGTERM, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
vars(__builtins__)["left"] = 1; logging.disable(50); sys.modules["colorsys"] = None; sys.path.append("left"); warnings.simplefilter("ignore")
random.seed(0); numpy.random.seed(0)
''', '''
write_json(Path(run_dir, "state.json"), [state, draws])
write_json(Path(run_dir, "result.json"), dict(metrics={"words/bits_per_byte": 1.0}))
''']


def planned(work: Path, runs: int, template: str) -> tuple[Path, list]:
    "A study's folder with its plan, and its cells"
    levels = {f"{n}": {"train_config.learning_rate": 1e-3*(n + 1)} for n in range(runs)}
    plan = make_plan(Study("warm", str(work/"base.yaml"), {"level": levels}, notebook=template, budget=Budget(640), seeds=[1]), load_config(work/"base.yaml"), fingerprint=lambda c: "text")
    (folder := work/"study").mkdir()
    (folder/"runs").mkdir()
    save_plan(plan, folder)
    return folder, plan.cells


def run_state_of(folder: Path, cell, warm: Warm | None):
    "What a run finds when it begins, and what it draws"
    job = start(folder, cell, choose_devices(0, 1, 1, [], 1), [], None, warm)
    assert job.process.wait(300) == 0, (folder/"runs"/cell.id/"log.txt").read_text()
    return read_json(folder/"runs"/cell.id/"state.json")


def test_a_run_finds_nothing_of_the_one_before(tmp_path):
    "Patched modules, environment, folder, threads, types, generators, handlers, limits: as in a fresh process"
    work = write_study(tmp_path, template=STATE)
    folder, cells = planned(work, 3, str(work/"template.ipynb"))
    warm = Warm(str(work/"template.ipynb"))
    try: (first, one), (second, two) = [run_state_of(folder, cell, warm) for cell in cells[:2]]
    finally: warm.close()
    assert warm.numbers == 2 and first == second
    assert not {*one} & {*two}, "two runs draw the same numbers from generators that nobody has seeded"
    cold, _ = run_state_of(folder, cells[2], None)
    assert {k: (cold[k], second[k]) for k in cold if cold[k] != second[k]} == {}


def test_warm_and_cold_runs_give_the_same_numbers(tmp_path):
    "The lab's own notebook: results, items, weights and optimizer to the bit; the same page but for times"
    base = json.loads(json.dumps(BASE)) | dict(eval_config=dict(max_tokens=500, eval_batch_size=4))
    base["model_config"]["vocab_size"] = 257
    base["train_config"]["save_steps"] = 5
    work = write_study(tmp_path, base=base)
    (work/"words.txt").write_text("".join(f"{n} and {n} is {2*n}\n\n" for n in range(600)))
    folder, (cell,) = planned(work, 1, "train_and_evaluate")
    warm, found = Warm(load_plan(folder).template), {}
    for name, server in (("warm", warm), ("cold", None)):
        job = start(folder, cell, choose_devices(0, 1, 1, [], 1), [], None, server)
        assert job.process.wait(300) == 0, (folder/"runs"/cell.id/"log.txt").read_text()
        found[name] = Path(shutil.move(folder/"runs"/cell.id, tmp_path/name))
    assert warm.hosts[0].ready and not warm.hosts[0].why
    warm.close()
    results = [read_json(found[n]/"result.json") for n in ("warm", "cold")]
    for r in results: r["training"] = {k: v for k, v in r["training"].items() if k in ("steps", "tokens", "final_train_loss", "skipped_steps")}
    assert results[0] == results[1]
    files = [{p.relative_to(found[n]): p.read_bytes() for p in found[n].rglob("*") if p.suffix == ".safetensors" or p.name in ("items.jsonl", "samples.jsonl")} for n in ("warm", "cold")]
    assert sum(p.suffix == ".safetensors" for p in files[0]) >= 2 and files[0] == files[1]
    states = [torch.load(found[n]/"checkpoint-10"/"trainer_state"/"state.pt", weights_only=True) for n in ("warm", "cold")]
    for state in states: del state["counters"]["seconds"]
    leaves, others = [tree_leaves(state) for state in states]
    assert len(leaves) == len(others) and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(leaves, others))
    outputs = [[(o["output_type"], o.get("name"), sorted(o.get("data", {})), re.sub(r"[\d.,:]+|<[^>]*>", "", "".join(o.get("data", {}).get("text/markdown", o.get("text", ""))))) for c in read_json(found[n]/"notebook.ipynb")["cells"] for o in c.get("outputs", [])] for n in ("warm", "cold")]
    assert outputs[0] == outputs[1]


def test_a_server_that_is_killed_is_replaced(tmp_path):
    "Its run is STALE, the others are made, nothing lives on, and a line says so; --resume makes the one that is missing"
    work = fake_study(tmp_path, seeds=[1])
    process = launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, "--parallel", 1, FAKE_STEP=0.1)
    beat = until(lambda: next((b for p in (work/"out").glob("*/runs/001*/heartbeat.json") if (b := p)), None) or process.poll() is not None, 120)
    status = read_json(beat.parent/"status.json")
    os.kill(server_of(process.pid), signal.SIGKILL)
    code, out = ended(process)
    folder, = (work/"out").iterdir()
    assert not process_mark(status["pid"])
    assert code == 1 and "STALE" in out and "the warm process ended with -9; another is started" in out, out
    assert [Run(p).state for p in sorted((folder/"runs").iterdir())] == ["STALE", "DONE"]
    code, out = ended(launch("--resume", "--output-dir", work/"out", FAKE_STEP=0))
    assert code == 0 and "1 of 2 runs to do" in out, out


def test_signals_reach_a_warm_run_and_it_saves(tmp_path):
    "Ctrl-C of the runner: the runs end with 75, as cold ones do"
    work = fake_study(tmp_path, seeds=[1])
    process = launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, "--parallel", 1, FAKE_STEP=0.3)
    until(lambda: [*(work/"out").glob("*/runs/001*/heartbeat.json")] or process.poll() is not None, 120)
    server = server_of(process.pid)
    process.send_signal(signal.SIGINT)
    code, out = ended(process)
    folder, = (work/"out").iterdir()
    assert code == 130 and run_state(next(folder.glob("runs/001*"))) == "PREEMPTED" and not process_mark(server), out
    assert ended(launch("--resume", "--cold", "--output-dir", work/"out", FAKE_STEP=0))[0] == 0


@pytest.fixture
def idle(tmp_path):
    "A template that imports little, and something that would start a run cold"
    work = write_study(tmp_path)
    folder, cells = planned(work, 3, str(work/"template.ipynb"))
    warm = Warm(str(work/"template.ipynb"))
    yield folder, cells, warm
    warm.close()


def test_changed_code_gets_a_server_of_its_own(idle, monkeypatch):
    "The old one stays until its run has ended"
    folder, cells, warm = idle
    jobs = [start(folder, cells[0], choose_devices(0, 1, 1, [], 1), [], None, warm)]
    until(lambda: jobs[0].process.poll() is not None or jobs[0].process.pid)
    monkeypatch.setattr("peer_nb.running.warm.stamp", lambda: ("changed",))
    jobs.append(start(folder, cells[1], choose_devices(0, 1, 1, [], 1), [], None, warm))
    assert len(warm.hosts) == 2 and warm.hosts[0].stamp != warm.hosts[1].stamp
    assert [j.process.wait(300) for j in jobs] == [0, 0]
    assert warm.look() == [] and len(warm.hosts) == 1 and not warm.deaths


THREAD = """
import sys, threading, time
if any("running.warm" in w for w in sys.orig_argv): threading.Thread(target=time.sleep, args=[99], daemon=True).start()
"""


def test_what_cannot_be_forked_starts_cold(idle, monkeypatch):
    "Imports that start a thread: a line says so, once, and all runs are made"
    folder, cells, warm = idle
    (folder/"sitecustomize.py").write_text(THREAD)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    pool, seen = Local(folder, choose_devices(0, 2, 3, [], 1), template=warm.template), []
    pool.submit(cells)
    while pool.busy:
        seen += pool.look()
        time.sleep(0.05)
    assert [e.note for e in seen if e.what == "told"] == ["the imports have started 1 thread; runs start cold"]
    assert {Run(folder/"runs"/c.id).state for c in cells} <= {"DONE", "FAILED"} and pool.warm.cold and not pool.warm.hosts


def test_one_run_alone_and_runs_on_several_gpus_start_cold(idle):
    folder, cells, warm = idle
    for runs, devices in [(cells[:1], choose_devices(0, 1, 1, [], 1)), (cells, choose_devices(2, 1, 3, ["0", "1"]))]:
        pool = Local(folder, devices, template=warm.template)
        pool.submit(runs)
        assert pool.warm is None
