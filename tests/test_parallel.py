"Several processes are one run: its losses, its files, its end."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peer_nb.config import Config, DatasetConfig, DatasetEntry, EvalConfig, MLAConfig, ModelConfig, PeerConfig, TrainConfig, load_config, save_config
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.perplexity import evaluate_heldout
from peer_nb.files import read_json
from peer_nb.training.checkpoints import latest_checkpoint
from peer_nb.training.launch import run_ranks
from peer_nb.training.loop import Trainer, main, train
from peer_nb.processes import join_processes
from test_training import assert_same, timeless

STEPS, STOP = 6, 3
KINDS = ("ddp", "fsdp2")
CURVES = {"ddp": {}, "fsdp2": {}, "sparse": dict(table_gradient="sparse"), "consumed": dict(table_gradient="consumed", gradient_accumulation_steps=1)}


def config(text: Path, out: Path, kind: str = "none", rows: int = 2, dropout: float = 0.0, table_gradient: str = "dense", **train) -> Config:
    "Batch-normalised queries, accumulation, clipping that is active, a tied head, sizes that two do not divide"
    keys = dict(output_dir=str(out), keep_optimizer_state=True, per_device_train_batch_size=rows, gradient_accumulation_steps=2, learning_rate=1e-2, max_steps=STEPS, parallel=kind, per_device_eval_batch_size=2,
                logging_steps=1, save_steps=STEPS, eval_steps=STEPS, log_level="info", max_grad_norm=0.3) | train
    peer = PeerConfig(num_experts=63, product_key_dim=[9, 7], num_heads=1, num_experts_per_tok=4, query_dim=16, query_norm="batch", table_gradient=table_gradient)
    model = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=63, vocab_size=259,
                        max_position_embeddings=64, peer_start_layer=1, peer_config=peer, tie_word_embeddings=True, dropout=dropout,
                        mla_config=MLAConfig(None, 16, 8, 16, 8))
    sources = [DatasetEntry("sums", str(text), weight=0.7), DatasetEntry("again", str(text), weight=0.3)]
    return Config(model, TrainConfig(**keys), DatasetConfig(sources, "bytes", max_seq_length=32, heldout_fraction=0.1),
                  EvalConfig(datasets=sources[:1], eval_batch_size=16, max_tokens=300))


def uneven(read):
    "Rows of which unequal parts are trained on, chosen by what is in them"
    def read_batches(self):
        batches = read(self)
        for batch in batches:
            for ids, labels in zip(batch["input_ids"], batch["labels"]): labels[:int(ids[:4].sum()) % 29] = -100
        return batches
    return read_batches


def stopping(step):
    "Rank 1 alone is asked to stop, in the middle of a step"
    def one_step(self):
        if self.rank == 1 and self.counters.step == STOP - 1: os.kill(os.getpid(), signal.SIGUSR1)
        return step(self)
    return one_step


def rank_program(words: list[str]) -> int:
    "What each of two processes does: a curve with each way to share, then runs that are stopped"
    text, place = map(Path, words)
    torch.set_num_threads(1)
    os.umask(0 if os.environ["RANK"] == "1" else 0o022)   # a file tells by its mode who wrote it
    plain, step = Trainer.read_batches, Trainer.step
    with join_processes("ddp") as processes, open(place/f"said-{processes.rank}.txt", "w") as said, redirect_stdout(said):
        Trainer.read_batches = uneven(plain)
        for name, keys in CURVES.items(): train(config(text, place/name/"curve", name if name in KINDS else "ddp", **keys))
        Trainer.read_batches = plain
        for kind in KINDS:
            train(config(text, place/kind/"whole", kind, dropout=0.1, gradient_checkpointing=True))
            Trainer.step = stopping(step)
            try: train(config(text, place/kind/"halves", kind, dropout=0.1, gradient_checkpointing=True))
            except SystemExit as stop: processes.wait(); assert stop.code == 75
            Trainer.step = step
        train(config(text, place/"ddp"/"halves", "ddp", dropout=0.1, gradient_checkpointing=True), resume=True)
    return 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "In this process, and in those that it starts"
    before, kept = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    yield
    torch.set_num_threads(before)
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text")/"sums.jsonl"
    pairs = [f"{a} plus {b} is {a + b}." for a in range(30) for b in range(30)]
    file.write_text("\n".join(json.dumps({"text": " ".join(pairs[i::90])}) for i in range(90)))
    return file


@pytest.fixture(scope="module")
def place(text, tmp_path_factory) -> Path:
    "Folder of the runs of two processes"
    place = tmp_path_factory.mktemp("two")
    assert run_ranks("test_parallel:rank_program", [str(text), str(place)], 2, cpu=True) == (0, "")
    return place


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    "One process that reads what two read; a run for each table gradient"
    place, plain = tmp_path_factory.mktemp("alone"), Trainer.read_batches
    Trainer.read_batches = uneven(plain)
    try:
        for name in ("ddp", "sparse", "consumed"): train(config(text, place/name, rows=4, **CURVES[name]))
    finally: Trainer.read_batches = plain
    (place/"fsdp2").symlink_to(place/"ddp")
    return place


def assert_same_end(out: Path, undisturbed: Path):
    "Weights, slices, optimiser, schedule, generators of both ranks, place in the data, metrics"
    a, b = (latest_checkpoint(folder) for folder in (out, undisturbed))
    assert a.name == b.name == f"checkpoint-{STEPS}"
    files = {path.relative_to(a) for path in a.rglob("*.safetensors")}
    assert files == {path.relative_to(b) for path in b.rglob("*.safetensors")}
    for file in files: assert_same(load_file(a/file), load_file(b/file), str(file))
    states = [torch.load(folder/"trainer_state"/"state.pt", weights_only=True) for folder in (a, b)]
    assert len(states[0]["rng"]) == 2 and not torch.equal(states[0]["rng"][0]["torch"], states[0]["rng"][1]["torch"])
    assert_same(*states)
    assert timeless(out) == timeless(undisturbed)


@pytest.mark.parametrize("name", CURVES)
def test_the_curve_is_that_of_one_process(name, place, alone):
    "With unequal numbers of trained tokens, clipping, accumulation and batch-normalised queries"
    single, double = timeless(alone/name), timeless(place/name/"curve")
    assert [line["step"] for line in double] == list(range(1, STEPS + 1)) and single[0].keys() == double[0].keys()
    for one, two in zip(single, double):
        assert (one["tokens"], one["learning_rate"]) == (two["tokens"], two["learning_rate"]) and one["grad_norm"] > 0.3
        for key in ("loss", "bits_per_byte", "grad_norm"): assert two[key] == pytest.approx(one[key], abs=1e-5), (key, one["step"])
    for key in (k for k in single[-1] if k.startswith("eval/")): assert double[-1][key] == pytest.approx(single[-1][key], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_evaluation_is_that_of_one_process_to_the_bit(kind, text, place):
    "The last checkpoint, scored here by one process, has the numbers that the ranks have logged"
    cfg, folder = config(text, place/kind/"curve"), latest_checkpoint(place/kind/"curve")
    cfg.eval_config.eval_batch_size = cfg.train_config.per_device_eval_batch_size
    here = evaluate_heldout(AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(cfg.dataset_config), cfg)["sums"]
    assert timeless(place/kind/"curve")[-1]["eval/sums/loss"] == here.loss and here.tokens > 2*2*31   # more batches than ranks


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_is_that_of_one_process(kind, place, alone):
    ours, theirs = latest_checkpoint(place/kind/"curve"), latest_checkpoint(alone/kind)
    assert read_json(ours/"config.json") == read_json(theirs/"config.json")
    model, other = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (ours, theirs))
    for name in other: torch.testing.assert_close(model[name], other[name], rtol=0, atol=1e-3, msg=lambda m: f"{name}: {m}")   # Adam divides by what is near zero
    assert {p.name for p in ours.glob("*")} == {p.name for p in theirs.glob("*")}
    assert len(list((ours/"trainer_state").glob("*.safetensors"))) == (2 if kind == "fsdp2" else 0)


def test_only_rank_0_writes(place):
    "A file tells by its mode who wrote it; the others' slices are the exception"
    for kind in KINDS:
        strange = [p.name for p in (place/kind).rglob("*") if p.is_file() and p.name != ".lock" and p.stat().st_mode & 0o022]
        assert all(name.startswith("shard-00002") for name in strange) and bool(strange) == (kind == "fsdp2"), strange
    assert "step 6/6" in (place/"said-0.txt").read_text() and (place/"said-1.txt").read_text() == ""


def test_stopped_by_one_rank_and_resumed_is_bit_identical(place):
    assert_same_end(place/"ddp"/"halves", place/"ddp"/"whole")
    assert latest_checkpoint(place/"fsdp2"/"halves").name == f"checkpoint-{STOP}"


def test_resumed_in_new_processes_is_bit_identical(place, capfd):
    "By the command; another number of processes is refused before"
    out = place/"fsdp2"/"halves"
    again = ["--config", str(latest_checkpoint(out)/"trainer_state"/"config.yaml"), "--resume"]
    assert main(again) == 2
    assert "was made by 2 processes, and this run has 1" in capfd.readouterr().err
    assert main([*again, "--processes", "2"]) == 0
    assert "step 6/6" in capfd.readouterr().out
    assert_same_end(out, place/"fsdp2"/"whole")


def by_command(text: Path, out: Path, ranks: int, kind: str, *words) -> list[dict]:
    "peer-train with some number of processes, four rows a step among them; the losses of its steps"
    save_config(config(text, out, kind, rows=4 // ranks, save_steps=STOP), out.with_suffix(".yaml"))
    assert main(["--config", str(out.with_suffix(".yaml")), "--processes", str(ranks), *words]) == 0
    return timeless(out)


@pytest.fixture(scope="module")
def stations(text, tmp_path_factory) -> dict:
    "Runs that were saved half way, by way of sharing: their folders and metrics"
    place = tmp_path_factory.mktemp("stations")
    return {kind: (place/kind, by_command(text, place/kind, 1 if kind == "none" else 2, kind)) for kind in ("none", *KINDS)}


@pytest.mark.slow
@pytest.mark.parametrize("before,after,ranks", [("ddp", "none", 1), ("fsdp2", "none", 1), ("none", "ddp", 2), ("none", "fsdp2", 2), ("fsdp2", "ddp", 2), ("fsdp2", "fsdp2", 1)])
def test_another_number_of_processes_goes_on_nearly(before, after, ranks, text, stations, tmp_path, capfd):
    "Weights, moments, rate and place in the data are taken over, and the log says what is not exact: without dropout the rest of the curve is the undisturbed one"
    whole, expected = stations[before]
    shutil.copytree(whole/f"checkpoint-{STOP}", tmp_path/"run"/f"checkpoint-{STOP}")
    capfd.readouterr()
    lines = by_command(text, tmp_path/"run", ranks, after, "--resume", "--allow-approximate-resume")
    said = capfd.readouterr().out
    assert f"approximate resume: {ranks} processes instead of {3 - ranks}" in said or before == "fsdp2" and after == "ddp", said
    assert "from nothing" not in said and "from their beginning" not in said, said
    assert [l["step"] for l in lines] == [4, 5, 6]
    for line, other in zip(lines, expected[STOP:]):
        assert line["learning_rate"] == pytest.approx(other["learning_rate"]) and line["loss"] == pytest.approx(other["loss"], abs=1e-4), (line["step"], said)


LIGHT = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])

def raises(words):
    "In the middle of a collective"
    import torch, torch.distributed as dist
    dist.init_process_group("gloo")
    for i in range(100_000):
        if rank == 1 and i == 3: raise ValueError("row 70 of a table of 63")
        dist.all_reduce(torch.ones(1))

def hangs(words):
    "Rank 0 does not notice: it waits for something else"
    if rank == 1: raise ValueError("row 70 of a table of 63")
    time.sleep(900); Path("slept").touch()

def killed(words):
    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(900); Path("slept").touch()

def saves(words):
    got = []
    signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    Path(f"ready-{rank}-{os.getpid()}").touch()
    while not got: time.sleep(0.01)
    Path(f"saved-{rank}").touch()
    return 75
"""


@pytest.fixture
def light(tmp_path, monkeypatch):
    "Programs that load no model"
    (tmp_path/"light.py").write_text(LIGHT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    return tmp_path


@pytest.mark.parametrize("program", ["raises", "hangs", "killed"])
def test_a_dying_rank_ends_the_job_and_is_blamed(light, program):
    code, text = run_ranks(f"light:{program}", [], 2, cpu=True, shown=False)
    if program == "killed": assert (code, text) == (137, "rank 1 of 2 was ended by SIGKILL: by somebody, or by the system for want of memory")
    else:
        assert code == 1 and text.startswith("Traceback") and f"in {program}\n" in text
        assert text.endswith("rank 1 of 2 failed: ValueError: row 70 of a table of 63"), text
    assert not (light/"slept").exists()   # the other rank was ended, and not waited for


def started(light: Path, program: str) -> tuple[subprocess.Popen, list[int]]: # launcher, process ids of its ranks
    "A launcher in a process of its own, whose ranks are at work"
    code = f"import sys; from peer_nb.training.launch import run_ranks; sys.exit(run_ranks('light:{program}', [], 2, cpu=True)[0])"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    while len(ready := list(light.glob("ready-*"))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    return launcher, [int(path.name.split("-")[-1]) for path in ready]


def alive(pid: int) -> bool:
    "Whether a process runs; a zombie does not"
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


@pytest.mark.skipif(sys.platform != "linux", reason="signals to process groups and their parents as Linux has them")
def test_ctrl_c_lets_ranks_save_and_a_killed_launcher_takes_them_along(light):
    launcher, _ = started(light, "saves")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(600) == 75 and {path.name for path in light.glob("saved-*")} == {"saved-0", "saved-1"}
    for path in light.glob("ready-*"): path.unlink()
    launcher, ranks = started(light, "saves")
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 600
    while any(map(alive, ranks)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
