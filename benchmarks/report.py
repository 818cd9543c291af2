"""How long planning and reporting take for studies that are larger than anybody would run.

    python benchmarks/report.py                      prints the figures
    python benchmarks/report.py --json report.json   also writes every sample
    python benchmarks/report.py --keep FOLDER        leaves the report of 1,000 runs there to be looked at

*Planning.* 10,000 runs around the demo's base configuration, resolved, checked, counted and hashed: once as 3,334 combinations
with three seeds, once as 10,000 combinations with one, the most that there can be to resolve. The text of the plan is counted
too. Fingerprints of the text are left out: they belong to the corpora and are looked up once for all runs that read the same text.

*Report.* 1,000 runs with made-up results: four axes, four seeds, two metrics that are scored ten times, 1,000 lines of training
each, a few failures, three claims. What counts is everything that `peer-ablate report` does: table, long table, figures, page.
The size is that of all it writes but the plotting library, which a study's folder holds once.

Each is run in a new process, several times in turn. The figure is the processor time of the process, which does not depend on
who else uses the machine; the wall time stands beside it.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def machine() -> dict:
    "Processor and cores, without names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(cpu=names[0] if names else platform.processor(), cores=len(os.sched_getaffinity(0)), system=platform.system(), python=platform.python_version())


def planning(seeds: int) -> dict:
    "Plan about 10,000 runs"
    from peer_nb.running.estimates import Forecast, plan_text
    from peer_nb.study.plan import make_plan
    from peer_nb.study.study import Budget, Study
    from peer_nb.config import load_config
    base = load_config(ROOT/"configs"/"demo.yaml")
    sizes = (10, 10, 10, 10) if seeds == 1 else (10, 10, 6, 6)
    made = dict(rate=lambda n: {"train_config.learning_rate": 1e-3*(n + 1)}, decay=lambda n: {"train_config.weight_decay": 0.01*(n + 1)},
                heads=lambda n: {"model_config.peer_config.num_heads": n + 1}, experts=lambda n: {"model_config.peer_config.num_experts_per_tok": 2*n + 2})
    axes = {axis: {f"{axis} {n}": of(n) for n in range(size)} for size, (axis, of) in zip(sizes, made.items())}
    begin, cpu = time.perf_counter(), time.process_time()
    plan = make_plan(Study("large", "demo.yaml", axes, seeds=list(range(1, seeds + 1)), budget=Budget(400_000)), base, fingerprint=lambda config: "text")
    text = plan_text(plan, Forecast())
    spent = dict(cpu_seconds=time.process_time() - cpu, wall_seconds=time.perf_counter() - begin)
    assert f"{len(plan.cells)} runs" in text and len({c.identity for c in plan.cells}) == len(plan.cells)
    return spent | dict(runs=len(plan.cells), hash=plan.hash[:12])


def made_up(folder: Path):
    "A study of 1,000 finished runs"
    import numpy as np
    from peer_nb.study.plan import make_plan, save_plan
    from peer_nb.study.study import study_from_dict
    from peer_nb.config import load_config
    from peer_nb.files import write_json
    axes = {"rate": {f"{10**n:g}": {"train_config.learning_rate": 1e-4*10**n} for n in range(2)} | {"5": {"train_config.learning_rate": 5e-4}, "50": {"train_config.learning_rate": 5e-3}, "2": {"train_config.learning_rate": 2e-4}},
            "heads": {f"{h} heads": {"model_config.peer_config.num_heads": h} for h in (1, 2, 4, 8, 16)}, "experts per head": {str(k): {"model_config.peer_config.num_experts_per_tok": k} for k in (2, 4, 8, 16, 32)},
            "length": {str(t): {"dataset_config.max_seq_length": t} for t in (64, 128)}}
    claims = [dict(name=f"{h} heads beat one", a={"heads": f"{h} heads"}, b={"heads": "1 heads"}) for h in (2, 4, 8)]
    study = study_from_dict(dict(name="large", base_config="demo.yaml", axes=axes, seeds=[1, 2, 3, 4], budget=dict(tokens=400_000), claims=claims))
    plan = make_plan(study, load_config(ROOT/"configs"/"demo.yaml"), fingerprint=lambda config: "text")
    save_plan(plan, folder)
    rng = np.random.default_rng(0)
    for number, cell in enumerate(plan.cells):
        run = folder/"runs"/cell.id
        run.mkdir(parents=True)
        if number % 97 == 5: write_json(run/"status.json", dict(state="FAILED", exit_code=1, seconds=9.0, error={"class": "ValueError", "message": "made up"})); continue
        value = 3 - 0.05*math.log2(int(cell.levels["heads"].split()[0])) + 0.01*cell.seed + 0.01*rng.standard_normal()
        lines = [dict(step=s, tokens=400*s, loss=round(value + 4*math.exp(-s/150) + 0.05*rng.standard_normal(), 5), lr=1e-3, tokens_per_second=9000.5) for s in range(1, 1001)]
        for s in range(100, 1001, 100): lines[s - 1] |= {f"eval/{name}/{key}": value + math.exp(-s/150) for name in ("docs", "source") for key in ("loss", "bits_per_byte")}
        (run/"metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(run/"status.json", dict(state="DONE", exit_code=0, seconds=60.0))
        write_json(run/"result.json", dict(metrics={f"{name}/{key}": value for name in ("docs", "source") for key in ("loss", "bits_per_byte", "perplexity")}, heldout={"docs": {"bits_per_byte_se": 0.01}, "source": {"bits_per_byte_se": 0.01}},
                   parameters=cell.parameters, training=dict(steps=1000, tokens=400_000, seconds=50 + rng.uniform(), tokens_per_second=8000.0, peak_memory_bytes=5e8), data=dict(docs=dict(documents=9000)), environment=dict(device="cpu", torch="2.13")))


def report(folder: Path) -> dict:
    "Everything that `peer-ablate report` does"
    from peer_nb.running.command import main
    begin, cpu = time.perf_counter(), time.process_time()
    assert main(["report", str(folder)]) == 0
    spent = dict(cpu_seconds=time.process_time() - cpu, wall_seconds=time.perf_counter() - begin)
    written = [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).parts[0] != "runs" and p.name not in ("plan.json", "plotly.min.js")]
    return spent | dict(runs=len(list((folder/"runs").iterdir())), megabytes=sum(p.stat().st_size for p in written)/1e6, page_megabytes=(folder/"index.html").stat().st_size/1e6)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="leave the made-up study here")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, _, value = options.one.partition(":")
        found = planning(int(value)) if kind == "plan" else report(Path(value))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as tmp:
        folder = options.keep or Path(tmp)/"large"
        folder.mkdir(parents=True)
        made_up(folder)
        jobs = {"planning 10,000 runs, three seeds": "plan:3", "planning 10,000 runs, one seed": "plan:1", "report of 1,000 runs": f"report:{folder}"}
        samples = {name: [] for name in jobs}
        for _ in range(options.rounds):
            for name, job in jobs.items():
                said = subprocess.run([sys.executable, __file__, "--one", job], check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
                samples[name].append(json.loads(said.splitlines()[-1]))
    middle = {name: {k: statistics.median(s[k] for s in found) if isinstance(found[0][k], (int, float)) else found[0][k] for k in found[0]} for name, found in samples.items()}
    for name, found in middle.items(): print(f"{name:36} {found['cpu_seconds']:6.2f} s of processor, {found['wall_seconds']:6.2f} s wall" + (f", {found['megabytes']:.1f} MB" if "megabytes" in found else f", {found['runs']:,} runs"))
    if options.json: options.json.write_text(json.dumps(dict(machine=machine(), median=middle, samples=samples), indent=1) + "\n")


if __name__ == "__main__": main()
