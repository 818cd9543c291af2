"A run that is interrupted anywhere, by anything, ends as the run that was not."
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peer_nb.config import Config, DatasetConfig, DatasetEntry, EvalConfig, MLAConfig, ModelConfig, PeerConfig, TrainConfig, UserError, save_config
from peer_nb.evaluation.command import main as peer_eval
from peer_nb.files import folder_lock, read_json, read_jsonl
from peer_nb.training import checkpoints
from peer_nb.training.checkpoints import latest_checkpoint
from peer_nb.training.loop import Trainer, main, train

STEPS = 12


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Forked children must not wait for threads that only their parent has"
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
                logging_steps=3, save_steps=4, eval_steps=6, log_level="error", table_learning_rate=2e-2, table_max_grad_norm=0.5) | train
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


def in_child(work) -> int:
    "Run a function in a forked process; its exit code, negative for the signal that ended it"
    pid = os.fork()
    if pid == 0:
        code = 70
        try: work(); code = 0
        except SystemExit as stop: code = stop.code
        finally: os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def test_resume_in_a_new_process_is_bit_identical(text, undisturbed, tmp_path):
    "Killed after step 7 in this process, continued from step 4 by the command in another"
    out, original = tmp_path/"run", Trainer.step

    def step(self):
        result = original(self)
        if self.counters.step == 7: os.kill(os.getpid(), signal.SIGKILL)
        return result

    def interrupted():
        Trainer.step = step
        train(config(text, out))

    assert in_child(interrupted) == -signal.SIGKILL
    assert latest_checkpoint(out).name == "checkpoint-4"
    assert [line["step"] for line in read_jsonl(out/"metrics.jsonl")] == [3, 6]
    save_config(config(text, out), tmp_path/"run.yaml")
    code = "from peer_nb.training.loop import main; raise SystemExit(main())"
    done = subprocess.run([sys.executable, "-c", code, "--config", str(tmp_path/"run.yaml"), "--resume"], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_end(out, undisturbed)


def test_sigterm_saves_at_the_step_boundary(text, undisturbed, tmp_path):
    out, original = tmp_path/"run", Trainer.step

    def step(self):
        if self.counters.step == 5: os.kill(os.getpid(), signal.SIGTERM)   # in the middle of the step
        return original(self)

    def interrupted():
        Trainer.step = step
        train(config(text, out))

    assert in_child(interrupted) == 75
    assert latest_checkpoint(out).name == "checkpoint-6"
    train(config(text, out), resume=True)
    assert_same_end(out, undisturbed)


class KillAt:
    "Ends the process, unasked, before the n-th change that a save makes to the disk"
    def __init__(self, n): self.n, self.seen, self.armed = n, 0, False

    def before(self, function):
        def wrapped(*args, **kwargs):
            if self.armed:
                if self.seen == self.n: os.kill(os.getpid(), signal.SIGKILL)
                self.seen += 1
            return function(*args, **kwargs)
        return wrapped


def killed_in_second_save(text: Path, out: Path, n: int) -> int:
    "Kill a run before the n-th file operation of its second save; 0 when the save has fewer"
    def work():
        kill, saves, original = KillAt(n), itertools.count(1), Trainer.save
        for module, name in ((torch, "save"), (os, "fsync"), (os, "replace"), (checkpoints.shutil, "rmtree"), (os, "unlink"), (os, "mkdir")):
            setattr(module, name, kill.before(getattr(module, name)))

        def save(self):
            kill.armed = next(saves) == 2
            folder = original(self)
            if kill.armed: os._exit(0)   # got through the save
            return folder

        Trainer.save = save
        train(config(text, out, save_total_limit=1))
    return in_child(work)


def test_kill_in_a_save_leaves_a_whole_checkpoint(text, tmp_path):
    "At every third operation of the save: the newest checkpoint is the one before or the new one, and it can be loaded"
    found = []
    for n in range(0, 400, 3):
        out = tmp_path/f"kill-{n}"
        code = killed_in_second_save(text, out, n)
        newest = latest_checkpoint(out)
        assert newest.name in ("checkpoint-4", "checkpoint-8"), n
        trainer = Trainer(config(text, out))
        trainer.restore(newest)
        assert trainer.counters.step == int(newest.name.split("-")[1])
        found.append(newest.name)
        if code == 0: break
        assert code == -signal.SIGKILL
    assert code == 0 and found == sorted(found, key=len) and len(found) > 8 and {"checkpoint-4", "checkpoint-8"} == set(found)


@pytest.mark.parametrize("n", [2, 30])
def test_run_killed_in_a_save_ends_undisturbed(text, undisturbed, tmp_path, n):
    out = tmp_path/"run"
    if killed_in_second_save(text, out, n) == 0: pytest.skip("the save has fewer operations")
    train(config(text, out), resume="auto")
    assert_same_end(out, undisturbed)
    assert not list(out.glob("*.tmp")) and not list(out.glob("*.removed"))


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
