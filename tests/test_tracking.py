"What a run says about itself, read back with other eyes."
import json
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peer_nb.config import Config, WandbConfig, apply_overrides, save_config
from peer_nb.files import UserError, read_json, read_jsonl
from peer_nb.training import tracking
from peer_nb.training.loop import Trainer, train
from test_ablation import BASE, COMMAND, STUDY, TEMPLATE, write_study
from test_training import config, one_thread, text, timeless   # noqa: F401 (fixtures)


@pytest.fixture
def tracked(text, tmp_path) -> Config:
    "Twelve steps, expert usage every five"
    cfg = config(text, tmp_path/"run", logging_steps=2)
    cfg.model_config.peer_config.log_freq, cfg.model_config.peer_config.usage_threshold = 5, 2.0
    return cfg


# ---- Weights & Biases, offline -------------------------------------------------------------------------------------------

def wandb_records(file: Path) -> list:
    "The records of an offline run, from the bytes of its file: a LevelDB log behind a header of seven bytes"
    from wandb.proto import wandb_internal_pb2
    data, place, piece, found = file.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7: place += room; continue
        _, size, kind = struct.unpack("<IHB", data[place:place + 7])
        piece, place = piece + data[place + 7:place + 7 + size], place + 7 + size
        if kind not in (1, 4): continue   # the record goes on in the next block
        found.append(wandb_internal_pb2.Record.FromString(piece))
        piece = b""
    return found


def wandb_history(records: list) -> dict[int, dict]:
    "step -> {name: value}; parts of a histogram under name.part"
    steps = {}
    for record in records:
        if record.WhichOneof("record_type") != "history": continue
        line = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        steps.setdefault(line["_step"], {}).update(line)
    return steps


@pytest.fixture(scope="module")
def offline(text, tmp_path_factory):
    "A run tracked offline in its own process, in two starts"
    folder = tmp_path_factory.mktemp("wandb")
    cfg = config(text, folder/"run", logging_steps=2)
    cfg.model_config.peer_config.log_freq = 5
    cfg.wandb_config = WandbConfig(project="sums", name="small", log_model="checkpoints")
    save_config(cfg, folder/"run.yaml")
    code = f"""
import os, signal, sys
from peer_nb.training import loop
step = loop.Trainer.step
def stop(self):
    if self.counters.step == 6 and not os.path.exists({str(folder/'stopped')!r}):
        open({str(folder/'stopped')!r}, "w").close(); os.kill(os.getpid(), signal.SIGUSR1)
    return step(self)
loop.Trainer.step = stop
sys.exit(loop.main(["--config", {str(folder/'run.yaml')!r}, "--resume"]))
"""
    for expected in (75, 0):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
    return folder/"run"


@pytest.mark.slow
@pytest.mark.skipif(tracking.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_gets_every_number_of_the_metrics(offline):
    "Both starts are one run there; each line of metrics.jsonl and usage.jsonl can be read back from what was written"
    records = [r for file in sorted(offline.glob("wandb/offline-run-*/run-*.wandb")) for r in wandb_records(file)]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run" and r.run.project]
    assert {(r.project, r.display_name, r.run_id) for r in runs} == {("sums", "small", read_json(offline/"wandb.json")["id"])}
    settings = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["train_config.max_steps"] == 12 and settings["model_config.peer_config.num_experts"] == 64
    history, lines = wandb_history(records), read_jsonl(offline/"metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    for line in lines:
        for key, value in line.items():
            if key != "step" and value is not None: assert history[line["step"]][key] == pytest.approx(value, rel=1e-12), key
    for line in read_jsonl(offline/"usage.jsonl"):
        seen = history[line["step"]]
        for layer, found in line["layers"].items():
            assert seen[f"experts/{layer}/usage"] == found["usage"] and seen[f"experts/{layer}/hot"] == found["hot"]
            assert seen[f"experts/{layer}/times_the_equal_share.values"] == found["experts"]
            assert seen.get(f"experts/{layer}/turnover") == found["turnover"]


@pytest.mark.slow
@pytest.mark.skipif(tracking.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_takes_models_without_their_trainer_state(offline):
    records = [r for file in offline.glob("wandb/offline-run-*/run-*.wandb") for r in wandb_records(file)]
    artifacts = [r.request.log_artifact.artifact for r in records if r.WhichOneof("record_type") == "request"] or []
    artifacts += [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    found = [a for a in artifacts if a.type == "model"]
    assert found, {r.WhichOneof("record_type") for r in records}
    names = {entry.path for entry in found[0].manifest.contents}
    assert {"config.json", "model.safetensors"} <= names and not any(name.startswith("trainer_state") for name in names)


TRACKED = [TEMPLATE[0], """
from pathlib import Path
from peer_nb.config import apply_overrides, load_config
from peer_nb.study.run import Result
from peer_nb.training.tracking import start_wandb
""", """
config = apply_overrides(load_config(config_path), overrides)
start_wandb(config, Path(run_dir)).finish()
Result(metrics={"words/bits_per_byte": 1.0}).write(run_dir)
"""]


@pytest.mark.slow
@pytest.mark.skipif(tracking.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_can_tell_the_runs_of_a_study(tmp_path):
    "Read back from what wandb wrote: project, name, group, levels"
    axes = {"rate": {"low": {}, "high = 0.02": {"train_config.learning_rate": 0.02}}, "heads": {"four": {}}}
    work = write_study(tmp_path, STUDY | dict(axes=axes), BASE | dict(wandb_config=dict(name="mine")), TRACKED)
    own = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"WANDB_PROJECT": "theirs", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*COMMAND, "--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", "0", "--parallel", "1"], capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr + done.stdout
    study, = (work/"out").iterdir()
    for level, run in zip(axes["rate"], sorted(study.glob("runs/*"))):
        file, = run.glob("wandb/offline-run-*/run-*.wandb")
        there = next(r.run for r in wandb_records(file) if r.WhichOneof("record_type") == "run" and r.run.project)
        columns = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in there.config.update}
        assert (there.project, there.run_group, there.display_name) == ("theirs", study.name, f"mine {run.name}")
        assert columns["levels.rate"] == level and columns["levels.heads"] == "four" and columns["train_config.seed"] == 42


@pytest.mark.skipif(tracking.find_spec("wandb") is None, reason="needs wandb")
@pytest.mark.parametrize("section, variables, project", [({}, {}, "peer_nb"), ({}, {"WANDB_PROJECT": "theirs"}, "theirs"), ({"project": "ours"}, {"WANDB_PROJECT": "theirs"}, "ours")])
def test_whose_project_it_is(section, variables, project, tmp_path, monkeypatch):
    import wandb
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **keys: asked.update(keys))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    tracking.start_wandb(Config(wandb_config=WandbConfig(**section)), tmp_path)
    assert asked["project"] == project == read_json(tmp_path/"wandb.json")["project"]


def test_wandb_that_is_missing_is_said_first(tracked, monkeypatch):
    tracked.wandb_config = WandbConfig()
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'peer_nb.wandb.'"): train(tracked)
    assert not Path(tracked.train_config.output_dir).exists()


# ---- experts ------------------------------------------------------------------------------------------------------------

def test_usage_counts_what_the_router_chose(tracked, monkeypatch):
    "Recounted from the router's own answers, step by step, in float64"
    tracked.train_config.eval_steps = 3   # evaluations in the middle of counting do not count
    from peer_nb.models.peer import PEER
    route, seen, now = PEER.route, {}, {}

    def spied(self, x, mask=None):
        weights, index = route(self, x, mask)
        if "step" in now: seen.setdefault((now["step"], id(self)), []).append((weights.detach().double().flatten(), index.flatten()))
        return weights, index
    step = Trainer.step

    def counted(self):
        now["step"] = self.counters.step + 1
        try: return step(self)
        finally: now.clear()
    monkeypatch.setattr(PEER, "route", spied); monkeypatch.setattr(Trainer, "step", counted)
    result = train(tracked)
    layers = {id(m): name for name, m in result.model.named_modules() if isinstance(m, PEER)}
    lines = read_jsonl(Path(tracked.train_config.output_dir)/"usage.jsonl")
    assert [line["step"] for line in lines] == [5, 10]
    for line in lines:
        for key, name in layers.items():
            pieces = [p for s in range(line["step"] - 4, line["step"] + 1) for p in seen[s, key]]
            scores = torch.zeros(64, dtype=torch.float64)
            for weights, index in pieces: scores.index_add_(0, index, weights)
            share, found = scores / scores.sum(), line["layers"][name]
            assert found["tokens"] == 5*2*2*32 and found["unused"] == int((scores == 0).sum())
            assert found["hot"] == int((share*64 > 2).sum()) and sum(found["experts"]) + found["unused"] == 64
            assert found["unevenness"] == pytest.approx((share[share > 0] * (64*share[share > 0]).log()).sum().item(), abs=1e-6)
            assert found["hottest"][:1] == [[row, round(times, 2)] for times, row in [(lambda m: (m.values.item(), m.indices.item()))((share*64).max(0))]][:found["hot"]]
            assert {*found["busiest"]} == {*scores.nonzero()[:, 0].tolist()} and found["busiest"][0] == scores.argmax()
    for name in layers.values():
        before, now = (line["layers"][name] for line in lines)
        gone = [row for row in before["busiest"] if row not in now["busiest"]]
        assert before["turnover"] is None and now["turnover"] == len(gone)/len(before["busiest"])


def test_usage_can_be_switched_off(tracked):
    tracked.model_config.peer_config.log_expert_usage = False
    train(tracked)
    assert not (Path(tracked.train_config.output_dir)/"usage.jsonl").exists()


# ---- bits, data, signs of life --------------------------------------------------------------------------------------------

def test_bits_per_byte_of_a_step_by_decoding(text, tmp_path):
    "The bytes of a step's targets, by decoding them instead of looking them up"
    cfg = config(text, tmp_path/"run")
    cfg = apply_overrides(cfg, {"dataset_config.tokenizer_name": "corpus:bpe:257", "model_config.dropout": 0.0})
    trainer = Trainer(cfg)
    batches = trainer.read_batches()
    trainer.batches = iter(batches)
    result, size, count = trainer.step(), 0, 0
    for batch in batches:
        for row in batch["labels"][:, 1:]:
            kept = [t for t in row.tolist() if t != trainer.tokenizer.eos_token_id]
            size, count = size + len(trainer.tokenizer.decode(kept).encode()), count + len(row)
    assert result.bits_per_byte == pytest.approx(result.loss * count / size / 0.6931471805599453, rel=1e-6)


def test_a_run_says_what_it_read(text, tmp_path, caplog):
    cfg = config(text, tmp_path/"run")
    cfg.train_config.log_level = "info"
    with caplog.at_level(logging.INFO, "peer_nb"): train(cfg)
    manifest = read_json(tmp_path/"run"/"data.json")
    assert [(s["name"], s["share"]) for s in manifest["sources"]] == [("sums", 0.7), ("again", pytest.approx(0.3))]
    said = caplog.messages[-1]
    assert said.startswith("trained on sums ") and ", again " in said
    bars = [m for m in caplog.messages if m.startswith("step 12/12")]
    assert len(bars) == 1 and all(word in bars[0] for word in ("loss ", " bits/byte", " tokens/s", " MiB", " left"))


def test_an_evaluation_beats(text, tmp_path, monkeypatch):
    cfg, phases = config(text, tmp_path/"run"), []
    original = tracking.write_json
    monkeypatch.setattr(tracking, "write_json", lambda path, value: (phases.append(value["phase"]) if "phase" in value else None, original(path, value))[1])
    beat = tracking.Heartbeat.__init__
    monkeypatch.setattr(tracking.Heartbeat, "__init__", lambda self, path, total, every=0.0: beat(self, path, total, every))
    train(cfg)
    assert phases.count("saving") == 3 and phases.count("evaluating") > 2 * 2   # twice, some batches each
    assert read_json(tmp_path/"run"/"heartbeat.json")["phase"] == "training" and len(timeless(tmp_path/"run")) == 4
