"A run that is interrupted anywhere, by anything, ends as the run that was not."
import itertools
import json
import logging
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import Child, in_child

from peer_nb.config import (Config, DatasetConfig, DatasetEntry, EvalConfig, MLAConfig, ModelConfig, PeerConfig, TrainConfig, apply_overrides, load_config,
                            save_config)
from peer_nb.data.corpora import data_fingerprint, is_heldout
from peer_nb.evaluation.command import main as peer_eval
from peer_nb.files import UserError, folder_lock, read_json, read_jsonl, write_json
from peer_nb.training import checkpoints
from peer_nb.training.checkpoints import check_seal, latest_checkpoint
from peer_nb.training.loop import Trainer, ask_facts, main, score_heldout, train

STEPS = 12
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "As many as the children have: equal to the bit is equal with as many threads"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text")/"sums.jsonl"
    pairs = [f"{a} plus {b} is {a + b}." for a in range(30) for b in range(30)]
    file.write_text("\n".join(json.dumps({"text": " ".join(pairs[i::90])}) for i in range(90)))
    return file


def config(text: Path, out: Path, **train) -> Config:
    "Small, with everything that could spoil a resume: dropout, batch statistics, accumulation, two sources"
    keys = dict(output_dir=str(out), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, max_steps=STEPS,
                logging_steps=3, save_steps=4, eval_steps=6, log_level="error", keep_optimizer_state=True, table_learning_rate=2e-2, table_max_grad_norm=0.5) | train
    peer = PeerConfig(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="batch")
    model = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=260,
                        max_position_embeddings=64, peer_start_layer=0, peer_config=peer, tie_word_embeddings=True, dropout=0.1,
                        mla_config=MLAConfig(None, 16, 8, 16, 8))
    sources = [DatasetEntry("sums", str(text), weight=0.7), DatasetEntry("again", str(text), weight=0.3)]
    return Config(model, TrainConfig(**keys), DatasetConfig(sources, "bytes", max_seq_length=32, heldout_fraction=0.1),
                  EvalConfig(datasets=sources[:1], eval_batch_size=16))


def timeless(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in read_jsonl(out/"metrics.jsonl")]


def assert_same(a, b, where=""):
    "Equal to the bit, through dicts and lists"
    if isinstance(a, torch.Tensor): assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds", "line_seconds"}: assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): assert_same(x, y, f"{where}[{i}]")
    else: assert a == b, where


def assert_same_end(out: Path, undisturbed: Path):
    "Weights, optimiser, schedule, generators, place in the data, metrics"
    a, b = (latest_checkpoint(folder) for folder in (out, undisturbed))
    assert a.name == b.name == f"checkpoint-{STEPS}" == (out/"latest").read_text().strip()
    assert (a/"model.safetensors").read_bytes() == (b/"model.safetensors").read_bytes()
    assert_same(*(torch.load(folder/"trainer_state"/"state.pt", weights_only=True) for folder in (a, b)))
    assert timeless(out) == timeless(undisturbed)


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")/"undisturbed"
    train(config(text, out))
    return out


def killed_after_seven_steps(cfg: Config):
    original = Trainer.step

    def step(self):
        result = original(self)
        if self.counters.step == 7: os.kill(os.getpid(), signal.SIGKILL)
        return result

    Trainer.step = step
    train(cfg)


def test_resume_in_a_new_process_is_bit_identical(text, undisturbed, tmp_path):
    "Killed after step 7 in one process, continued from step 4 by the command in another"
    out = tmp_path/"run"
    in_child(killed_after_seven_steps, config(text, out), ends=-signal.SIGKILL)
    assert latest_checkpoint(out).name == "checkpoint-4"
    assert [line["step"] for line in read_jsonl(out/"metrics.jsonl")] == [3, 6]
    save_config(config(text, out), tmp_path/"run.yaml")
    code = "from peer_nb.training.loop import main; raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", code, "--config", str(tmp_path/"run.yaml"), "--resume"], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_end(out, undisturbed)


VARIANTS = {   # what a resume could spoil, beside what `config` has
    "sparse tables, 2 workers, expert statistics": {"model_config.peer_config.table_gradient": "sparse", "dataset_config.num_workers": 2,
        "model_config.peer_config.log_freq": 9, "train_config.save_steps": 5},
    "consumed tables": {"model_config.peer_config.table_gradient": "consumed", "train_config.gradient_accumulation_steps": 1,
        "model_config.peer_config.expert_hidden_size": 4},
    "bfloat16, varlen packs, 2 workers": {"train_config.bf16": True, "dataset_config.packing": "varlen", "dataset_config.num_workers": 2},
    "mixture of experts, loads of which move a bias": {"model_config.memory_kind": "moe", "model_config.moe_config": dict(n_routed_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=16, bias_update_rate=0.01), "model_config.peer_config.log_freq": 9, "train_config.gradient_checkpointing": True, "train_config.save_steps": 5},
    "UltraMem beside a feed-forward": {"model_config.memory_kind": "ultramem", "model_config.peer_config.query_norm": None, "model_config.peer_config.log_freq": 9, "train_config.save_steps": 5},
    "n-grams, different ones of which are counted": {"model_config.use_peer": False, "model_config.engram_config": dict(layers=[0, 1], num_heads=2, table_size=50, embed_dim=16),
        "model_config.peer_config.log_freq": 9, "train_config.save_steps": 5},
    "float8, shared memory": {"train_config.fp8": True, "model_config.share_memory": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_run_resumes_to_the_bit(text, tmp_path, monkeypatch, changes):
    "Straight; and from what there was on the disk after step 7, as a kill would have left it"
    if "consumed" in changes.values() or "train_config.fp8" in changes: pytest.importorskip("torchao")
    make = lambda out: apply_overrides(config(text, out), changes)
    straight, halves, original = tmp_path/"straight", tmp_path/"halves", Trainer.step

    def step(self):
        result = original(self)
        if self.counters.step == 7: shutil.copytree(straight, halves)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        train(make(straight))
    assert latest_checkpoint(halves).name in ("checkpoint-4", "checkpoint-5")
    train(make(halves), resume="auto")
    assert_same_end(halves, straight)
    usage = [read_jsonl(out/"usage.jsonl") for out in (halves, straight)]
    assert usage[0] == usage[1] and len(usage[0]) == (1 if "model_config.peer_config.log_freq" in changes else 0)


def signalled_in_step_six(runs: list[tuple[Config, int]]):
    "One run after another hears its signal in the middle of a step, and ends by asking to be started again"
    original = Trainer.step
    for cfg, number in runs:
        def step(self):
            if self.counters.step == 5: os.kill(os.getpid(), number)
            return original(self)

        Trainer.step = step
        with pytest.raises(SystemExit) as stop: train(cfg)
        assert stop.value.code == 75, f"{number}: {stop.value.code}"


def test_signals_save_at_the_step_boundary(text, undisturbed, tmp_path):
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    in_child(signalled_in_step_six, [(config(text, tmp_path/number.name), number) for number in numbers])
    for out in (tmp_path/number.name for number in numbers):
        assert latest_checkpoint(out).name == "checkpoint-6"
        train(config(text, out), resume=True)
        assert_same_end(out, undisturbed)


CHANGES = ((torch, "save"), (os, "fsync"), (os, "replace"), (checkpoints.shutil, "rmtree"), (os, "unlink"), (os, "mkdir"))


class Saved(Exception): "The second save is done"


def second_save(cfg: Config, before):
    "Train until a second save is done; `before(n)` is called before the n-th change that it makes to the disk"
    inside, changes, saves, original = [False], itertools.count(), itertools.count(1), Trainer.save

    def watched(function):
        def call(*args, **kwargs):
            if inside[0]:
                inside[0] = False   # what is done before the change is no change
                before(next(changes))
                inside[0] = True
            return function(*args, **kwargs)
        return call

    def save(self):
        inside[0] = next(saves) == 2
        folder = original(self)
        if inside[0]: raise Saved
        return folder

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Saved):
        for module, name in CHANGES: patch.setattr(module, name, watched(getattr(module, name)))
        patch.setattr(Trainer, "save", save)
        try: train(cfg)
        finally: inside[0] = False


def test_kill_in_a_save_leaves_a_whole_checkpoint(text, undisturbed, tmp_path):
    """What a kill would leave, copied before every change of a save: the newest checkpoint is the one before or the new one, it can be loaded,
    and from an early and a late one of these the run ends as the undisturbed one"""
    out, found = tmp_path/"run", []
    second_save(config(text, out, save_total_limit=1), lambda n: shutil.copytree(out, tmp_path/str(n)))
    trainer = Trainer(config(text, tmp_path/"again"))
    for n in range(len(list(tmp_path.iterdir())) - 1):
        newest = latest_checkpoint(tmp_path/str(n))
        assert newest.name in ("checkpoint-4", "checkpoint-8"), n
        trainer.restore(newest)
        assert trainer.counters.step == int(newest.name.split("-")[1])
        found.append(newest.name)
    assert found == sorted(found) and len(found) > 24 and {"checkpoint-4", "checkpoint-8"} == set(found)
    for killed in (tmp_path/"2", tmp_path/str(len(found) - 2)):
        train(config(text, killed), resume="auto")
        assert_same_end(killed, undisturbed)
        assert not list(killed.glob("*.tmp")) and not list(killed.glob("*.removed"))


# ---- kill -9, anywhere ----------------------------------------------------------------------------------------------------

def saves_begun(out: Path) -> set[int]:
    "Folders of saves that are not finished, by inode: one that an earlier kill has left is not a new one"
    found = set()
    for folder in out.glob("checkpoint-*.tmp"):
        try: found.add(folder.stat().st_ino)
        except FileNotFoundError: continue   # renamed meanwhile
    return found


def resumed(cfg: Config): train(cfg, resume="auto")


def killed_after(cfg: Config, seconds: float, saving: Path | None = None) -> bool:
    """Go on with a run in a process that is killed unasked; whether it was, before it was done

    With a folder, some milliseconds after a save into it has begun, once the seconds are over"""
    before = saves_begun(saving) if saving else set()
    child, end = Child(resumed, cfg), time.monotonic() + seconds
    while time.monotonic() < end or saving is not None and not saves_begun(saving) - before:
        if child.process.poll() is not None:
            child.ends(0)
            return False
        time.sleep(0.001)
    if saving is not None: time.sleep(random.uniform(0, 0.02))
    child.process.kill()
    child.process.wait()
    return True


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_instants(text, tmp_path, kills):
    "Killed, continued, killed again, until enough; what comes out is the undisturbed run's, and the newest checkpoint was whole each time"
    make = lambda out: config(text, out, save_steps=2, logging_steps=2, eval_steps=6)
    begun = time.monotonic()
    train(make(tmp_path/"undisturbed"))
    whole, instants, report, runs = time.monotonic() - begun, random.Random(kills), [], 0
    while len(report) < kills:
        out, runs = tmp_path/f"run-{runs}", runs + 1
        while len(report) < kills:
            before = saves_begun(out)
            seconds, saving = instants.uniform(0, 0.5*whole), out if len(report) % 2 else None   # every second kill waits for a save
            if not killed_after(make(out), seconds, saving): break
            newest = latest_checkpoint(out)
            if newest: check_seal(newest)
            report.append(dict(in_a_save=bool(saves_begun(out) - before), newest=newest.name if newest else None))
        train(make(out), resume="auto")
        assert_same_end(out, tmp_path/"undisturbed")
    if kills < 30: return
    inside = sum(kill["in_a_save"] for kill in report)
    assert inside > 0
    write_json(ROOT/"benchmarks"/"kill_test.json", dict(kills=len(report), inside_a_save=inside, runs=runs, steps_per_run=STEPS, steps_between_saves=2,
        before_the_first_save=sum(kill["newest"] is None for kill in report), newest_checkpoint_whole=sum(kill["newest"] is not None for kill in report),
        runs_that_ended_as_the_undisturbed_one=runs, each=report))


# ---- disks and damage -------------------------------------------------------------------------------------------------------

def filled_in_second_save(runs: list[tuple[Config, int]]):
    "In the second save of each run no file may grow beyond a size; the errors are printed, a line each"
    free, original = resource.getrlimit(resource.RLIMIT_FSIZE), Trainer.save
    for cfg, room in runs:
        def save(self):
            if self.counters.step == 8: resource.setrlimit(resource.RLIMIT_FSIZE, (room, free[1]))
            return original(self)

        Trainer.save = save
        with pytest.raises(UserError) as refused: train(cfg)
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        print(refused.value)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(text, undisturbed, tmp_path):
    "In the second save no file may grow to one's size: the error names what is left, and a resume from there ends undisturbed"
    rooms = {file: (undisturbed/"checkpoint-8"/file).stat().st_size - 1 for file in ("config.json", "model.safetensors", "trainer_state/state.pt")}
    outs = [tmp_path/str(n) for n, _ in enumerate(rooms)]
    said = in_child(filled_in_second_save, [(config(text, out), room) for out, room in zip(outs, rooms.values())])
    messages = [line for line in said.splitlines() if "cannot be written to" in line]
    assert len(messages) == len(outs), said
    for out, message in zip(outs, messages):
        assert message.endswith(f"the newest whole checkpoint is {out/'checkpoint-4'}"), message
        assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-4"]
        check_seal(out/"checkpoint-4")
        train(config(text, out), resume="auto")
        assert_same_end(out, undisturbed)


def test_a_folder_that_cannot_be_written_to(text, tmp_path):
    (tmp_path/"file").write_text("here is no folder")
    with pytest.raises(UserError, match="not a folder that can be written to"): train(config(text, tmp_path/"file"/"run"))


@pytest.mark.parametrize("file, damage, named", [
    ("model.safetensors", lambda data: data[:-7], "bytes instead of"),
    ("trainer_state/state.pt", lambda data: data[:len(data)//2], "bytes instead of"),
    ("model.safetensors", lambda data: data[:-4] + b"edit", "was changed"),
    ("trainer_state/config.yaml", lambda data: data.replace(b"dropout: 0.1", b"dropout: 0.2"), "was changed"),
    ("config.json", lambda data: None, "is missing")])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used_on_request(text, undisturbed, tmp_path, capsys, file, damage, named):
    out = tmp_path/"run"
    shutil.copytree(undisturbed, out)
    path = out/"checkpoint-12"/file
    data = damage(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    save_config(config(text, out), tmp_path/"run.yaml")
    assert main(["--config", str(tmp_path/"run.yaml"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "checkpoint-12 is damaged" in message and f"{file} " in message and named in message and f"--resume {out/'checkpoint-8'}" in message
    check_seal(out/"checkpoint-8")
    assert main(["--config", str(tmp_path/"run.yaml"), "--resume", str(out/"checkpoint-8")]) == 0
    assert_same_end(out, undisturbed)


# ---- the same run or none -----------------------------------------------------------------------------------------------------

OTHERS = {   # what has changed since the checkpoint: what the refusal names
    "dataset_config.num_workers": (2, "dataset_config.num_workers: None in the checkpoint, 2 now"),
    "train_config.freeze_layer_map": ({"*": "train"}, "train_config.freeze_layer_map"),
    "model_config.dropout": (0.2, "model_config.dropout: 0.1 in the checkpoint, 0.2 now"),
    "train_config.per_device_train_batch_size": (4, "train_config.per_device_train_batch_size")}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damaged", [False, True])
def test_the_newest_checkpoint_is_gone_or_damaged(text, undisturbed, tmp_path, capsys, caplog, damaged, finished):
    "What can be gone on from is, to the bit; a finished run has weights only, and it is said what to do; `latest` names what is there"
    out = tmp_path/"run"
    save_config(cfg := config(text, out, keep_optimizer_state=not finished, log_level="warning"), tmp_path/"run.yaml")
    if finished: train(cfg)
    else: shutil.copytree(undisturbed, out)
    newest = latest_checkpoint(out)
    if damaged: (newest/"model.safetensors").write_bytes((newest/"model.safetensors").read_bytes()[:-8])
    else: shutil.rmtree(newest)
    start = lambda *words: main(["--config", str(tmp_path/"run.yaml"), *words])
    code, said = start("--resume"), capsys.readouterr().err
    if damaged:
        assert code == 2 and f"{newest} is damaged: model.safetensors has" in said
        if not finished:
            assert f"--resume {out}/checkpoint-8" in said
            code = start("--resume", str(out/"checkpoint-8"))
    if finished:
        assert code == 2 and "weights only" in said and "pretrained_layer_path" in said and said.count("\n") == 1
        if not damaged: assert f"{newest} is gone; latest names checkpoint-8 now" in caplog.text
    else: assert code == 0 and assert_same_end(out, undisturbed) is None
    assert (out/(out/"latest").read_text().strip()).is_dir()


@pytest.mark.parametrize("key", OTHERS)
def test_another_run_is_refused_with_the_difference(text, undisturbed, tmp_path, key):
    value, named = OTHERS[key]
    with pytest.raises(UserError, match=named): Trainer(apply_overrides(config(text, tmp_path), {key: value})).restore(undisturbed/"checkpoint-8")


def test_another_world_and_other_data_are_refused_or_said(text, undisturbed, tmp_path, monkeypatch, caplog):
    "The text of a source has grown, and two processes read it"
    grown = tmp_path/"grown.jsonl"
    grown.write_text(text.read_text() + "\n" + json.dumps({"text": "one more line, which was not there before"}))
    here = config(text, tmp_path/"run", log_level="warning")
    original, build_data, world = text.read_bytes(), Trainer.build_data, [2]

    def in_a_world(self):
        self.world_size = world[0]
        build_data(self)

    monkeypatch.setattr(Trainer, "build_data", in_a_world)
    with pytest.raises(UserError, match="world_size: then 1, now 2"): Trainer(here).restore(undisturbed/"checkpoint-8")
    world[0] = 1
    try:
        text.write_text(grown.read_text())
        trainer = Trainer(here)
        with pytest.raises(UserError, match="sources.sums.text: then"): trainer.restore(undisturbed/"checkpoint-8")
        world[0] = 2
        trainer = Trainer(here)
        with caplog.at_level(logging.WARNING, "peer_nb"): trainer.restore(undisturbed/"checkpoint-8", approximate=True)
    finally: text.write_bytes(original)
    said = "\n".join(caplog.messages)
    assert "the order of the data is not exact: world_size: then 1, now 2" in said and "sources.sums.text" in said
    assert trainer.counters.step == 8 and trainer.loader.rows == 8*2*2
    trainer.step()


def test_an_approximate_resume_by_the_command(text, undisturbed, tmp_path, capsys, caplog):
    "Twice the steps at half the rate: refused, then taken with the differences in the log"
    shutil.copytree(undisturbed, tmp_path/"run")
    save_config(config(text, tmp_path/"run", max_steps=24, learning_rate=5e-3, log_level="warning"), tmp_path/"run.yaml")
    assert main(["--config", str(tmp_path/"run.yaml"), "--resume"]) == 2
    assert "--allow-approximate-resume" in capsys.readouterr().err
    assert main(["--config", str(tmp_path/"run.yaml"), "--resume", "--allow-approximate-resume"]) == 0
    said = "\n".join(caplog.messages)
    assert "train_config.max_steps was 12 in the checkpoint and is 24 now" in said and "train_config.learning_rate was 0.01" in said
    lines = read_jsonl(tmp_path/"run"/"metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(3, 25, 3))
    rates = [line["learning_rate"] for line in lines if line["step"] > 12]
    assert all(0 < rate < 5e-3 for rate in rates) and rates == sorted(rates, reverse=True)


# ---- a curve that stays what it is ----------------------------------------------------------------------------------------------

def curve(cfg: Config, steps: int) -> list[float]:
    "Losses of the first steps"
    trainer = Trainer(cfg)
    return [trainer.step().loss for _ in range(steps)]


def test_what_a_set_is_called_changes_no_loss(text, tmp_path):
    cfg = config(text, tmp_path)
    called = replace(cfg, dataset_config=replace(cfg.dataset_config, datasets=[replace(e, name=name) for e, name in zip(cfg.dataset_config.datasets, "xy")]))
    assert curve(cfg, 6) == curve(called, 6)


def test_golden_curve(text, tmp_path):
    "50 steps of configs/small.yaml on sums, in bytes: text that is the same on every machine"
    cfg = apply_overrides(load_config(ROOT/"configs"/"small.yaml"), {"train_config.output_dir": str(tmp_path), "train_config.max_tokens": 25_600,
        "dataset_config.tokenizer_name": "bytes", "dataset_config.max_seq_length": 128,
        "dataset_config.datasets": [dict(name="sums", path=str(text))], "eval_config.datasets": [dict(name="sums", path=str(text))]})
    golden = read_json(ROOT/"tests"/"golden_curve.json")
    assert curve(cfg, 50) == pytest.approx(golden["sums"], rel=2e-3)


@pytest.mark.slow
def test_golden_curve_of_the_documentation(tmp_path):
    "50 steps of configs/small.yaml as it stands; Python's documentation differs from version to version"
    cfg = apply_overrides(load_config(ROOT/"configs"/"small.yaml"), {"train_config.output_dir": str(tmp_path)})
    golden = read_json(ROOT/"tests"/"golden_curve.json")
    if golden["data"] != data_fingerprint(cfg): pytest.skip("the curve was pinned with the documentation of another Python")
    assert curve(cfg, 50) == pytest.approx(golden["docs"], rel=2e-3)


def test_checkpoint_scores_as_the_run_did(text, undisturbed, tmp_path):
    "peer-eval on the saved folder, without a configuration, repeats the last line of metrics"
    scores = tmp_path/"scores.json"
    assert peer_eval(["perplexity", "--checkpoint", str(latest_checkpoint(undisturbed)), "--output", str(scores)]) == 0
    assert read_json(scores)["texts"]["sums"]["bits_per_byte"] == pytest.approx(timeless(undisturbed)[-1]["eval/sums/bits_per_byte"], abs=1e-7)


def test_gradient_checkpointing_changes_nothing(text, tmp_path):
    "Neither the weights nor the running statistics of the queries, which a second forward pass would move twice"
    ends = []
    for on in (False, True):
        trainer = Trainer(config(text, tmp_path/"none", gradient_checkpointing=on))   # seeds the generators
        for _ in range(3): trainer.step()
        ends.append(trainer.model.state_dict())
    plain, recomputed = ends
    for name in plain: torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_losses_and_weights_of_the_transformers_trainer(text, tmp_path):
    "Same rows in the same order, tokens of unequal number in the batches of a step: another loop, the same run"
    from transformers import Trainer as Peer, TrainerCallback, TrainingArguments
    cfg = config(text, tmp_path/"ours", max_steps=6, weight_decay=0.0, table_learning_rate=None, table_max_grad_norm=None)
    cfg.model_config.dropout = 0.0
    ours, peer = Trainer(cfg), Trainer(cfg)
    batches = [batch for _ in range(6) for batch in peer.read_batches()]
    for i, batch in enumerate(batches): batch["labels"][:, : 5*(i % 4)] = -100
    rows = [{key: value[r] for key, value in batch.items()} for batch in batches for r in range(2)]
    ours.batches = iter(batches)
    losses = [ours.step().loss for _ in range(6)]

    class InOrder(Peer):
        def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(rows)

    class Keep(TrainerCallback):
        seen = []
        def on_log(self, args, state, control, logs, **kwargs): self.seen += [logs["loss"]] if "loss" in logs else []

    keys = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, max_steps=6, weight_decay=0.0, adam_beta2=0.95,
                lr_scheduler_type="cosine", warmup_steps=1, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True)
    InOrder(peer.model, TrainingArguments(str(tmp_path/"theirs"), **keys), train_dataset=rows, callbacks=[Keep]).train()
    assert losses == pytest.approx(Keep.seen, abs=1e-4)   # theirs are rounded for the log
    theirs = peer.model.state_dict()
    for name, value in ours.model.state_dict().items(): torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_two_runs_do_not_share_a_folder(text, tmp_path):
    out = tmp_path/"run"
    out.mkdir()
    with folder_lock(out), pytest.raises(UserError, match="in use by"): train(config(text, out))


@pytest.mark.parametrize("changes, named", [
    ({"train_config.max_steps": "null"}, "train_config.max_tokens"),
    ({"model_config.vocab_size": "200"}, "vocab_size is 200, but the tokenizer 'bytes' has 257"),
    ({"train_config.max_steps": "null", "train_config.num_train_epochs": "1", "dataset_config.datasets.0.streaming": "true"}, "steps_per_epoch"),
    ({"dataset_config.datasets.0.path": "nowhere.jsonl"}, "nowhere.jsonl")])
def test_mistakes_are_one_line_and_write_nothing(text, tmp_path, capsys, changes, named):
    save_config(config(text, tmp_path/"run"), tmp_path/"run.yaml")
    assert main(["--config", str(tmp_path/"run.yaml"), *(f"{k}={v}" for k, v in changes.items())]) == 2
    message = capsys.readouterr().err
    assert message.startswith("peer-train: error:") and named in message and "Traceback" not in message
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("held, named", [(True, "has no text to train on beside what is held out"), (False, "is held out")])
def test_an_empty_part_is_said_before_anything_is_made(held, named, streaming, tmp_path, capsys):
    "A set whose only document is held out, and one of which nothing is"
    only = next(t for t in (f"This is document {i}, and there is no other." for i in range(999)) if is_heldout(t, .1) == held)
    (tmp_path/"one.jsonl").write_text(json.dumps(dict(text=only)) + "\n")
    save_config(config(tmp_path/"one.jsonl", tmp_path/"run"), tmp_path/"run.yaml")
    streams = [f"dataset_config.datasets.{i}.streaming={streaming}" for i in (0, 1)]
    assert main(["--config", str(tmp_path/"run.yaml"), *streams]) == 2
    message = capsys.readouterr().err
    assert message.startswith("peer-train: error: dataset 'sums'") and named in message and "Traceback" not in message
    assert not (tmp_path/"run").exists()


def test_a_metric_that_is_no_number_ends_the_run_with_its_name(text, tmp_path, monkeypatch):
    "Also one of an evaluation of somebody's own; the lines before it stay, and a study calls the failure what it is"
    from peer_nb.running.wrapper import error_kind
    from peer_nb.training import loop
    step = lambda trainer: trainer.counters.step
    monkeypatch.setattr(loop, "EVALUATIONS", [lambda trainer: {"mine/ratio": math.nan if step(trainer) == 4 else 1.0}])
    with pytest.raises(UserError, match=r"metrics.jsonl: not written, .* not finite: eval/mine/ratio is nan") as error:
        train(config(text, tmp_path, max_steps=6, eval_steps=2, logging_steps=1))
    assert [line["step"] for line in read_jsonl(tmp_path/"metrics.jsonl")] == [1, 2, 3]
    assert error_kind("UserError", str(error.value)) == "not finite"


def sizes(checkpoint: Path) -> dict[str, int]:
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}


def test_a_finished_run_keeps_its_weights(text, undisturbed, tmp_path, capsys):
    "Twice the weights are gone; the run can be finished again, used, and continued nearly; nothing is damaged"
    cfg = config(text, tmp_path/"run", keep_optimizer_state=False)
    train(cfg)
    kept = checkpoints.checkpoints(tmp_path/"run")
    assert [folder.name for folder in kept] == ["checkpoint-8", "checkpoint-12"]
    for folder in kept:
        check_seal(folder)
        assert (folder/"model.safetensors").read_bytes() == (undisturbed/folder.name/"model.safetensors").read_bytes()
        weights = sizes(folder)["model.safetensors"]
        beside = [sum(s for name, s in sizes(f).items() if name.startswith("trainer_state")) for f in (folder, undisturbed/folder.name)]
        assert beside[1] - beside[0] > 1.9*weights   # two moments of each weight
    state = torch.load(kept[1]/"trainer_state"/"state.pt", weights_only=True)
    assert "optimizer" not in state and not (kept[0]/"trainer_state"/"state.pt").exists()
    before = timeless(tmp_path/"run")
    again = train(cfg, resume=True)   # as a study does whose process was killed before it wrote the result
    assert timeless(tmp_path/"run") == before and again.heldout["sums"].loss == before[-1]["eval/sums/loss"]

    file = save_config(cfg, tmp_path/"run.yaml")
    for words in (["--resume", str(kept[0])], ["--resume", str(kept[0]), "--allow-approximate-resume"]):
        assert main(["--config", str(file), *words]) == 2
        said = capsys.readouterr().err
        assert "keeps its weights only" in said and "keep_optimizer_state" in said and len(said.splitlines()) == 1
    assert main(["--config", str(file), "--resume", "--allow-approximate-resume", "train_config.max_steps=16"]) == 0
    assert timeless(tmp_path/"run")[-1]["step"] == 16


def test_an_unfinished_run_keeps_all(text, undisturbed, tmp_path):
    "Killed by its last save, it is continued from the one before, which nobody has touched"
    out = tmp_path/"run"
    cfg = config(text, out, keep_optimizer_state=False)
    trainer_save = Trainer.save
    def killed(self):
        if self.counters.step == STEPS: os._exit(9)
        return trainer_save(self)
    if (child := os.fork()) == 0:
        Trainer.save = killed
        train(cfg)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert "optimizer" in torch.load(latest_checkpoint(out)/"trainer_state"/"state.pt", weights_only=True)
    train(cfg, resume=True)
    assert (out/"checkpoint-12"/"model.safetensors").read_bytes() == (undisturbed/"checkpoint-12"/"model.safetensors").read_bytes()
    assert timeless(out) == timeless(undisturbed)


@pytest.mark.parametrize("level, steps, scores, warned", [("debug", 6, 1, 1), ("info", 0, 1, 1), ("warning", 0, 0, 1), ("error", 0, 0, 0)])
def test_what_a_log_level_says(text, tmp_path, level, steps, scores, warned, caplog, monkeypatch):
    "Each step in debug, scores from info on, a step that was skipped from warning on"
    original = Trainer.update
    monkeypatch.setattr(Trainer, "update", lambda self, buffers: float("nan") if self.counters.step == 2 else original(self, buffers))
    train(config(text, tmp_path/"run", log_level=level, max_steps=6))
    said = caplog.messages
    each = [m for m in said if "gradient norm" in m and "skipped" not in m]
    assert (len(each), sum("bits per byte, perplexity" in m for m in said), sum("step 3 skipped" in m for m in said)) == (steps, scores, warned), said


@pytest.mark.parametrize("own, general, rows", [(None, 5, 5), (3, 5, 3)])
def test_how_many_rows_an_evaluation_reads_at_once(text, tmp_path, own, general, rows):
    "Held-out text and the questions of tasks; seen in the model's own forward passes"
    cfg = config(text, tmp_path/"run", per_device_eval_batch_size=own)
    facts = DatasetEntry("facts", task="digit_lookup", task_arguments=json.dumps(dict(num_pairs=20, num_known=10, num_novel=10)), mask="digit_lookup")
    cfg.dataset_config.datasets.append(facts)
    cfg.eval_config.eval_batch_size = general
    trainer, seen = Trainer(cfg), []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])), with_kwargs=True)
    score_heldout(trainer)
    texts = max(seen); seen.clear()
    ask_facts(trainer)
    assert (texts, max(seen)) == (rows, rows)
