"""What the small configurations of the memory tasks learn: trains configs/memory/*.yaml and asks every question of their test sets.

    python benchmarks/memory_tasks.py                                 prints a table, some minutes on two cores
    python benchmarks/memory_tasks.py --json memory_tasks.json        also writes all metrics
    python benchmarks/memory_tasks.py synthetic_qa two_hop            some of them

Recall is exact match of the whole answer under teacher forcing (one forward pass), which is what greedy decoding gives.
One seed each: these are demonstrations that the data, the masks and the training work together, not comparisons.
"""
import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers

from peer_nb.config import load_config
from peer_nb.data.corpora import task_arguments
from peer_nb.evaluation.recall import recall_of, start_of
from peer_nb.tasks.writing import generate
from peer_nb.training.loop import train

CONFIGS = Path(__file__).parents[1]/"configs"/"memory"


def machine() -> dict:
    "Processor and cores, without names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(cpu=names[0] if names else platform.processor(), cores=len(names) or None, system=platform.system())


def learn(task: str) -> dict:
    "Train one configuration and ask it"
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(CONFIGS/f"{task}.yaml", {"train_config.output_dir": folder})
        start = time.process_time()
        done = train(cfg, progress=False)
        seconds = time.process_time() - start
    entry = cfg.dataset_config.datasets[0]
    splits = {name: rows for name, rows in generate(task, **task_arguments(entry)).items() if name != "train"}
    return dict(task=task, arguments=task_arguments(entry), steps=done.steps, tokens=done.tokens, cpu_seconds=round(seconds),
                final_loss=done.metrics[-1]["loss"], recall=recall_of(done.model.eval(), done.tokenizer, task, splits, start=start_of(cfg.dataset_config.packing)))


def main():
    found = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=found, help=f"of {', '.join(found)}; default: all")
    parser.add_argument("--json", type=Path, help="write all metrics")
    args = parser.parse_args()
    if unknown := sorted(set(args.tasks) - set(found)): parser.error(f"no configuration for {', '.join(unknown)}; there are {', '.join(found)}")
    results = []
    for task in args.tasks:
        results.append(learn(task))
        shown = {key: value for key, value in results[-1]["recall"].items() if key.endswith("exact_match")}
        print(f"{task}: {results[-1]['tokens']:,} tokens, {results[-1]['cpu_seconds']} s of CPU", *(f"  {key}: {value:.3f}" for key, value in shown.items()), sep="\n", flush=True)
    if args.json:
        about = dict(machine=machine(), python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__, threads=torch.get_num_threads())
        args.json.write_text(json.dumps(about | dict(results=results), indent=1) + "\n")


if __name__ == "__main__": main()
