"""What adapters hold, where they should go, and what is forgotten: the three studies of configs/adapters, gathered.

    python benchmarks/adapters.py OUT                          runs the studies in OUT, half an hour on two cores
    python benchmarks/adapters.py OUT --json adapters.json     also writes the numbers that the pages show
    python benchmarks/adapters.py OUT --only-read --json …     of studies that lie there already

A study that was begun in OUT is finished, and nothing is computed twice. Runs that are not done are left out.
"""
import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers

from peer_nb.findings.effects import usable_runs
from peer_nb.findings.results import StudyRuns, load_runs
from peer_nb.running.command import main as peer_ablate

STUDIES = Path(__file__).parents[1]/"configs"/"adapters"
NEW, OLD = "new/test_known/", "old/test_known/"


def newest(out: Path, name: str) -> Path | None:
    "The folder of a study, if there is one"
    return max(out.glob(f"{name}-*"), key=lambda folder: (folder/"plan.json").stat().st_mtime, default=None)


def make(out: Path, name: str) -> None:
    "Run a study, or finish it"
    begun = ["--resume"] if newest(out, name) else []
    code = peer_ablate(["--study", str(STUDIES/f"{name}.yaml"), "--gpus", "0", "--output-dir", str(out), *begun])
    if code: sys.exit(f"{name}: not every run is done (exit code {code})")


def numbers(row) -> dict:
    "What every page needs of a run"
    return dict(seed=int(row.seed), parameters=int(row["trained/parameters"]), known=row[NEW + "exact_match"], logprob=row[NEW + "answer_logprob"],
                old_known=row[OLD + "exact_match"], old_logprob=row[OLD + "answer_logprob"], seconds=round(row.seconds, 1))


def curve(study: StudyRuns, run: str) -> list[list[float]]:
    "Step, log-probability of the new table and of the old, whenever both were asked"
    keys = [f"eval/{table}answer_logprob" for table in (NEW, OLD)]
    return [[line["step"], *(round(line[key], 4) for key in keys)] for line in study[run].metrics[1] if all(key in line for key in keys)]


def gathered(out: Path) -> dict:
    "The three studies"
    found = {}
    for name in ("capacity", "where", "forgetting"):
        study = load_runs(newest(out, name))
        rows = [row for _, row in usable_runs(study.rows, NEW + "exact_match").iterrows()]
        if name == "capacity": found[name] = [dict(facts=int(row.facts), rank=int(row["rank"])) | numbers(row) for row in rows]
        elif name == "where": found[name] = [dict(adapters=row.adapters, rate=row.learning_rate) | numbers(row) for row in rows]
        else: found[name] = [dict(method=row.method) | numbers(row) | dict(curve=curve(study, row.run)) for row in rows]
        found[f"{name}_planned"] = len(study)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the studies")
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--only-read", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.only_read:
        for name in ("capacity", "where", "forgetting"): make(args.out, name)
    found = gathered(args.out)
    for name in ("capacity", "where", "forgetting"): print(f"{name}: {len(found[name])} of {found[name + '_planned']} runs")
    if args.json:
        about = dict(benchmark="adapters", how="python benchmarks/adapters.py OUT --json adapters.json", python=platform.python_version(), torch=torch.__version__,
                     transformers=transformers.__version__, threads=1)
        args.json.write_text(json.dumps(about | found) + "\n")


if __name__ == "__main__": main()
