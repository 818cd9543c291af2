"The Slurm launcher against a real Slurm on this machine: submit, run, attach, cancel, time-out, requeue, a node that dies."
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from peer_nb.study.run import Run
from peer_nb.files import read_json, read_jsonl, write_json

sys.path.insert(0, str(Path(__file__).parent/"slurm"))
from cluster import Cluster, installed
from fake_studies import ended, fake_study, launch, until

pytestmark = pytest.mark.skipif(not installed(), reason="needs root, slurm-wlm, munge: apt-get install slurm-wlm munge")
pytest.importorskip("submitit", reason="pip install 'peer_nb[slurm]'")

LOG = Path(__file__).parent/"slurm"/"log.json"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), gpus=2, max_array=3) as running:
        os.environ.update(running.environment)
        try: yield running
        finally:
            for key in running.environment: del os.environ[key]


@pytest.fixture(scope="module")
def log():
    "What happened, kept as a file when the whole campaign was run"
    steps, begun = [], time.monotonic()
    yield lambda test, what: steps.append(dict(test=test, second=round(time.monotonic() - begun), what=what))
    if len({s["test"] for s in steps}) == 6:
        write_json(LOG, dict(slurm=subprocess.run(["sinfo", "--version"], capture_output=True, text=True).stdout.strip(), steps=steps))


def slurm(*words) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def runs_of(work: Path) -> dict[str, str]:
    "Run: state"
    folder, = (work/"out").iterdir()
    return {c["id"]: Run(folder/"runs"/c["id"]).state for c in read_json(folder/"plan.json")["plan"]["cells"]}


def job_of(folder: Path, run: str) -> str:
    "The job of a run, such as 3_1"
    for path in sorted((folder/"slurm").glob("[0-9]*.json"), reverse=True):
        record = read_json(path)
        if run in record["runs"]:
            lines = [l.split("|") for l in slurm("squeue", "-h", "-r", "-t", "all", "-n", record["name"], "-o", "%K|%F").split()]
            index = record["runs"].index(run)
            return next(f"{job}_{k}" if k.isdigit() else job for k, job in lines if k in (str(index), "N/A"))


def at_step(folder: Path, run: str, step: int) -> bool:
    return ((read_json(folder/"runs"/run/"heartbeat.json") or {}).get("step") or 0) >= step


def the_folder(work: Path) -> Path:
    return until(lambda: [*(work/"out").glob("*/plan.json")])[0].parent


def begun(folder: Path, run: str) -> list[dict]:
    return [r for r in read_jsonl(folder/"begun.jsonl") if r["run"] == run]


SUBMIT = ["--launcher", "slurm", "--gpus", 1, "--partition", "long"]


def test_submitted_in_arrays_and_run(cluster, tmp_path, log):
    "Four runs where an array may have three elements: two submissions, a GPU of its own for each run, one table"
    work = fake_study(tmp_path)
    code, out = ended(launch("--study", work/"study.yaml", "--output-dir", work/"out", *SUBMIT))
    folder = the_folder(work)
    assert code == 0 and "4 of 4 runs done" in out, out
    assert [len(read_json(p)["runs"]) for p in sorted((folder/"slurm").glob("[0-9]*.json"))] == [3, 1]
    results = [read_json(folder/"runs"/r/"result.json") for r in runs_of(work)]
    assert {r["environment"]["visible"] for r in results} <= {"0", "1"}
    assert pd.read_csv(folder/"ablation_results.csv").state.tolist() == ["DONE"]*4
    log("submitted", "4 runs in arrays of 3 and 1: all DONE, each on one made-up GPU")


@pytest.mark.slow
def test_the_runner_is_killed_and_the_jobs_go_on(cluster, tmp_path, log):
    work = fake_study(tmp_path, axes={"heads": {"four": {}}})
    first = launch("--study", work/"study.yaml", "--output-dir", work/"out", *SUBMIT, FAKE_STEP=1)
    folder = the_folder(work)
    run = [*runs_of(work)][0]
    until(lambda: at_step(folder, run, 2))
    first.kill()
    ended(first)
    log("runner killed", "kill -9 of the runner at step 2 of 10")
    code, out = ended(launch("--resume", "--output-dir", work/"out"))
    assert code == 0 and "2 of 2 runs done" in out, out
    assert len([*(folder/"slurm").glob("[0-9]*.json")]) == 1 and len(begun(folder, run)) == 1
    log("runner killed", "--resume found both jobs by name, submitted nothing, and ended with 2 of 2 runs DONE")


@pytest.mark.slow
def test_a_cancelled_job_is_noticed_and_taken_up_on_request(cluster, tmp_path, log):
    work = fake_study(tmp_path, axes={"heads": {"four": {}}})
    first = launch("--study", work/"study.yaml", "--output-dir", work/"out", *SUBMIT, FAKE_STEP=1)
    folder = the_folder(work)
    run, other = runs_of(work)
    until(lambda: at_step(folder, run, 2))
    slurm("scancel", job_of(folder, run))
    code, out = ended(first)
    states = runs_of(work)
    assert code == 1 and states == {run: "PREEMPTED", other: "DONE"}, out
    log("job cancelled", f"scancel at step 2: {states[run]}, saved at step {read_json(folder/'runs'/run/'checkpoint.json')['step']}; the other run DONE; not submitted again by itself")
    code, out = ended(launch("--resume", "--output-dir", work/"out"))
    steps = [r["step"] for r in read_jsonl(folder/"runs"/run/"metrics.jsonl")]
    assert code == 0 and steps == [*range(1, 11)], out
    log("job cancelled", "--resume: went on from there, each of 10 steps made once, DONE")


@pytest.mark.slow
def test_time_limits(cluster, tmp_path, log):
    "A run that hears the warning saves and goes on in its next job; one that is deaf is FAILED: timeout"
    work = fake_study(tmp_path, axes={"ears": {"open": {}, "deaf": {"train_config.learning_rate": 0.02}}}, seeds=[1])
    code, out = ended(launch("--study", work/"study.yaml", "--output-dir", work/"out", *SUBMIT, "--time", 1, "--slurm", "signal_delay_s=20", FAKE_STEP=8), 1800)
    folder = the_folder(work)
    heard, deaf = runs_of(work)
    assert code == 1 and runs_of(work) == {heard: "DONE", deaf: "FAILED"}, out
    assert read_json(folder/"runs"/deaf/"status.json")["error"]["kind"] == "timeout"
    assert [r["step"] for r in read_jsonl(folder/"runs"/heard/"metrics.jsonl")] == [*range(1, 11)] and len(begun(folder, heard)) >= 2
    log("time limit", f"--time 1 for 80 s of work: the run that hears SIGUSR2 was requeued and DONE after {len(begun(folder, heard))} jobs, begun at steps {[r['at'] for r in begun(folder, heard)]}; the deaf one FAILED, timeout")


@pytest.mark.slow
def test_a_node_dies(cluster, tmp_path, log):
    work = fake_study(tmp_path, axes={"heads": {"four": {}}})
    first = launch("--study", work/"study.yaml", "--output-dir", work/"out", *SUBMIT, FAKE_STEP=1)
    folder = the_folder(work)
    run, other = runs_of(work)
    until(lambda: at_step(folder, run, 2) and at_step(folder, other, 1))
    cluster.kill_node()
    until(lambda: Run(folder/"runs"/run).state == "STALE", 60)
    log("node dies", "slurmd and all that it had started killed at step 2: both runs STALE")
    until(lambda: cluster.node_state() == "down", 180)
    log("node dies", "Slurm noticed: the node is down, its jobs are back in the queue")
    cluster.start_node()
    code, out = ended(first)
    assert code == 0 and [r["step"] for r in read_jsonl(folder/"runs"/run/"metrics.jsonl")] == [*range(1, 11)], out
    assert begun(folder, run)[-1]["at"] >= 2
    log("node dies", f"node up again: the jobs went on from step {begun(folder, run)[-1]['at']}, 2 of 2 runs DONE, no step made twice")


SMALL = ["--tokens", 2000, "model_config.hidden_size=32", "model_config.intermediate_size=64", "model_config.peer_config.num_experts=256", "model_config.peer_config.product_key_dim=[16, 16]"]
TASKS = {"digit_lookup": "{num_pairs: 32, num_known: 32, num_novel: 32, seed: 1}", "hashhop": "{num_samples: 200, num_eval: 20, n_chars: 60, num_queries: 2, hops: [1], lengths: [3], alphabets: [lower], seed: 1}",
         "synthetic_qa": "{num_pairs: 32, seed: 1}", "two_hop": "{num_entities: 64, num_novel: 8, num_novel_ood: 8, num_known: 16, chain_of_thought: true, seed: 1}"}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_memory_studies_run_to_their_page(task, cluster, tmp_path, log):
    "The command that a study's file gives, word for word; smaller models, fewer tokens, one seed"
    shutil.copytree(LOG.parent.parent.parent/"configs"/"memory", tmp_path/"configs"/"memory")
    study = tmp_path/"configs"/"memory"/"slurm"/f"{task}.yaml"
    command = next(l.removeprefix("#").split() for l in study.read_text().splitlines() if "peer-ablate" in l)
    study.write_text(study.read_text().replace("seeds: [1, 2, 3]", "seeds: [1]"))
    code, out = ended(launch(*command[1:], *SMALL, f"dataset_config.datasets.0.task_arguments={TASKS[task]}", cwd=tmp_path), 1800)
    folder, = (tmp_path/"ablation_results").iterdir()
    rows = pd.read_csv(folder/"ablation_results.csv")
    assert code == 0 and rows.state.tolist() == ["DONE"]*len(rows) and rows.seed.tolist() == [1]*len(rows), out
    metric = read_json(folder/"plan.json")["plan"]["metric"]
    assert rows[metric].notna().all() and f"best {metric}" in out, out
    assert (folder/"index.html").stat().st_size > 10_000 and len([*folder.glob("runs/*/report.html")]) == len(rows)
    log("memory tasks", f"`peer-ablate --study {command[2].rpartition('/')[2]} {' '.join(command[3:])}`: {len(rows)} runs, all DONE, and a page")
