"A study of runs that take a second: a template that keeps its place, hears signals, and writes down each step that it computes."
import os
import subprocess
import time
from pathlib import Path

from test_ablation import BASE, COMMAND, STUDY, write_study

TEMPLATE = ['''
config_path: str = ""
run_dir: str = ""
levels: dict = {}
overrides: dict = {}
resume: bool = False
''', '''
from peer_nb.files import append_jsonl, die_with_parent, read_json, write_json
die_with_parent()
import os, random, signal, time
from pathlib import Path
from peer_nb.config import apply_overrides, load_config
run, config, asked = Path(run_dir), apply_overrides(load_config(config_path), overrides), []
deaf = levels.get("ears") == "deaf"
for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"): signal.signal(getattr(signal, name), signal.SIG_IGN if deaf else lambda n, _: asked.append(n))
''', '''
place = read_json(run/"checkpoint.json") if resume else None   # step and sum: the sum shows a step that was left out or made twice
step, total = (place["step"], place["sum"]) if place else (0, 0.0)
append_jsonl(run.parent.parent/"begun.jsonl", dict(run=run.name, pid=os.getpid(), at=step, attempt=read_json(run/"status.json")["attempt"]))
while step < (1000 if deaf else 10):
    step += 1
    total += random.Random(config.train_config.seed*1000 + step).random()*config.model_config.peer_config.num_heads
    append_jsonl(run/"metrics.jsonl", dict(step=step, tokens=64*step, loss=4 - step/10))
    write_json(run/"checkpoint.json", dict(step=step, sum=total))
    write_json(run/"heartbeat.json", dict(step=step, total_steps=10, tokens=64*step, loss=4 - step/10, tokens_per_second=100.0, phase="training", time=time.time()))
    time.sleep(float(os.environ.get("FAKE_STEP", "0.05")))
    if asked: raise SystemExit(75)
''', '''
write_json(run/"result.json", dict(schema=1, metrics={"words/bits_per_byte": total, "words/loss": 2*total}, parameters=dict(total=1000, active=10),
           training=dict(tokens=640, seconds=1.5, tokens_per_second=426.7, peak_memory_bytes=12345), environment=dict(python="3", device="cpu", threads=1, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))))
append_jsonl(run.parent.parent/"ended.jsonl", dict(run=run.name))
''']


def fake_study(folder: Path, **changes) -> Path:
    "A folder with a study of four such runs"
    axes = {"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}}}
    return write_study(folder, {**STUDY, "axes": axes, "seeds": [1, 2], **changes}, BASE, TEMPLATE)


def launch(*words, cwd: Path | None = None, **environment) -> subprocess.Popen:
    "peer-ablate in its own process, its words in files so that nobody waits for a reader"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in environment.items()}}
    return subprocess.Popen([*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=cwd)


def ended(process: subprocess.Popen, seconds: float = 900) -> tuple[int, str]:
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


def until(what, seconds: float = 600, pause: float = 0.05):
    "Wait for something to be true"
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)
    return value
