"""What running a study costs beside training and evaluation, and how long a look at a large study takes.

    python benchmarks/runner.py                      prints the figures
    python benchmarks/runner.py --json runner.json   also writes every sample

*Overhead of a run.* The demo's notebook is run for a few thousand tokens, one run after the other, each in a process of its own,
as every study does it. From the wall time between the start of the process and its end, the time of three cells is taken away, as
papermill has noted it: training (with its data, checkpoints and evaluations), expert usage, and writing samples. What is left is
the start of Python, the imports, the cells that describe the run, and drawing its report. The first run of a study is shown apart:
it may find caches cold. The same difference is taken of processor time, which depends less on who else uses the machine.

*Memory.* One more run, whose process is asked ten times a second for its proportional share (PSS: a page that several processes
have counts in each by its share) and for what is its alone (USS). The largest stand in the file.

*Status.* 10,000 runs on the disk, half of them done, some failed, some under way: `peer-ablate status`, from the start of Python to
the last line.

A machine that others use as well makes wall times longer; the load at the beginning stands in the file.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peer_nb.study.run import Run

ROOT = Path(__file__).parent.parent
WORK = ("train(cfg, resume", "layer.collect_usage()", "samples = []")
STATUS = "import sys; from peer_nb.running.command import main; sys.exit(main())"


def machine() -> dict:
    "Processor, cores and load, without names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(cpu=names[0] if names else platform.processor(), cores=len(os.sched_getaffinity(0)), system=platform.system(), python=platform.python_version(), load=round(os.getloadavg()[0], 1))


def children() -> float:
    "Processor seconds of processes that have ended"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def work_of(notebook: Path) -> float:
    "Seconds of the cells that train and evaluate"
    cells = [c for c in json.loads(notebook.read_text())["cells"] if any(w in "".join(c["source"]) for w in WORK)]
    assert len(cells) >= len(WORK), "the notebook has changed: its training and evaluating cells are not found"
    return sum(c["metadata"]["papermill"]["duration"] for c in cells)


def timed_template(path: Path) -> Path:
    "The demo's notebook, whose working cells note their processor time"
    from peer_nb.study.identity import find_template
    book = json.loads(Path(find_template("train_and_evaluate")).read_text())
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and any(w in source for w in WORK):
            cell["source"] = f"cpu_before = time.process_time()\n{source}\nwith open(Path(run_dir)/'cpu.txt', 'a') as file: file.write(f'{{time.process_time() - cpu_before}}\\n')"
    path.write_text(json.dumps(book))
    return path


def memory(pid: int) -> dict[str, float]:
    "Proportional share and own memory of a process, in MiB"
    try: rows = {k: int(v.split()[0]) for k, _, v in (line.partition(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])}
    except OSError: return {}
    return dict(pss=round(rows["Pss"]/1024), uss=round((rows["Private_Clean"] + rows["Private_Dirty"])/1024))


def start(folder: Path, cell) -> subprocess.Popen:
    from peer_nb.running.local import choose_devices, start
    return start(folder, cell, choose_devices(0, 1, 1, []), []).process


def timed(folder: Path, cell) -> dict:
    "Start a run and take its time"
    begin, cpu = time.perf_counter(), children()
    code = start(folder, cell).wait()
    wall, cpu = time.perf_counter() - begin, children() - cpu
    run = Run.of(folder, cell.id)
    assert code == 0, run.path("log").read_text()[-2000:]
    spent, used = work_of(run.path("notebook")), sum(map(float, (run.folder/"cpu.txt").read_text().split()))
    return dict(wall_seconds=round(wall, 2), work_seconds=round(spent, 2), overhead_seconds=round(wall - spent, 2), cpu_seconds=round(cpu, 2), overhead_cpu_seconds=round(cpu - used, 2))


def watched(folder: Path, cell) -> dict:
    "Start a run and take its memory"
    process, most = start(folder, cell), {}
    while process.poll() is None:
        time.sleep(0.1)
        most = {k: max(v, most.get(k, 0)) for k, v in memory(process.pid).items()} or most
    return most


def overheads(folder: Path, runs: int) -> dict:
    "Runs of a study, one at a time: the time of each, then the memory of one more"
    from peer_nb.study.plan import make_plan, save_plan
    from peer_nb.study.study import Budget, Study
    from peer_nb.config import apply_overrides, load_config
    base = apply_overrides(load_config(ROOT/"configs"/"demo.yaml"), {"eval_config.max_tokens": 2000, "dataset_config.tokenizer_name": "bytes", "model_config.vocab_size": 257})
    levels = {f"{n}": {"train_config.learning_rate": 1e-4*(n + 1)} for n in range(runs + 1)}
    (folder/"runs").mkdir(parents=True)
    plan = make_plan(Study("runner", str(ROOT/"configs"/"demo.yaml"), {"rate": levels}, notebook=str(timed_template(folder/"template.ipynb")), budget=Budget(2048), seeds=[1]), base)
    save_plan(plan, folder)
    *cells, last = plan.cells
    return dict(overhead=[timed(folder, cell) for cell in cells], memory=watched(folder, last))


def large_study(folder: Path, runs: int):
    "A study of many runs, as a runner would have left it half way"
    from peer_nb.study.plan import make_plan, save_plan
    from peer_nb.study.study import Budget, Study
    from peer_nb.config import load_config
    axes = {a: {f"{a} {n}": {f"train_config.{k}": s*(n + 1)} for n in range(100)} for a, k, s in [("rate", "learning_rate", 1e-4), ("decay", "weight_decay", 1e-3)]}
    plan = make_plan(Study("large", "demo.yaml", axes, seeds=[*range(1, runs//10_000 + 1)] or [1], budget=Budget(400_000)), load_config(ROOT/"configs"/"demo.yaml"), fingerprint=lambda config: "text")
    plan.cells = plan.cells[:runs]
    folder.mkdir(parents=True)
    save_plan(plan, folder)
    for n, cell in enumerate(plan.cells):
        run = folder/"runs"/cell.id
        run.mkdir(parents=True)
        if n % 2: continue
        state = dict(state="FAILED", exit_code=1, error={"class": "E", "kind": "code", "message": "m"}) if n % 20 == 0 else dict(state="DONE", exit_code=0, seconds=60.0)
        if n < 16: state = dict(state="RUNNING", pid=os.getpid(), host=platform.node())
        (run/"status.json").write_text(json.dumps(state))
        (run/"heartbeat.json").write_text(json.dumps(dict(step=5, total_steps=10, tokens=500, loss=2.0, tokens_per_second=100.0, phase="training")))
        if state["state"] == "DONE": (run/"result.json").write_text(json.dumps(dict(metrics={"docs/bits_per_byte": 2.0, "docs/loss": 3.0, "docs/perplexity": 20.0}, training=dict(steps=10, tokens=1000))))


def status(folder: Path, times: int) -> list[dict]:
    "peer-ablate status, several times"
    out = []
    for _ in range(times):
        begin, cpu = time.perf_counter(), children()
        said = subprocess.run([sys.executable, "-c", STATUS, "status", str(folder)], capture_output=True, text=True, check=True).stdout
        assert "runs:" in said and "RUNNING" in said
        out.append(dict(wall_seconds=round(time.perf_counter() - begin, 2), cpu_seconds=round(children() - cpu, 2)))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every sample there")
    parser.add_argument("--runs", type=int, default=4, help="runs of the study whose overhead is measured")
    parser.add_argument("--times", type=int, default=5, help="looks at the large study")
    given = parser.parse_args()
    found = dict(machine=machine())
    with tempfile.TemporaryDirectory() as place:
        found |= overheads(Path(place)/"study", given.runs)
        large_study(Path(place)/"large", 10_000)
        found["status_of_10000_runs"] = status(Path(place)/"large", given.times)
    first, *others = [r["overhead_seconds"] for r in found["overhead"]]
    found["summary"] = dict(overhead_first=first, overhead_others=statistics.median(others), overhead_cpu=statistics.median(r["overhead_cpu_seconds"] for r in found["overhead"]),
                            status_cpu=statistics.median(r["cpu_seconds"] for r in found["status_of_10000_runs"]),
                            status_wall=statistics.median(r["wall_seconds"] for r in found["status_of_10000_runs"]))
    print(json.dumps(found["summary"], indent=1))
    if given.json: given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
