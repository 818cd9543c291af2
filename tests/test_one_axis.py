"One file, pinned or swept: the command lines as a person types them, on a base that fits into a test."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_pretrained import bases   # noqa: F401 (fixture)
from test_tracking import wandb_records
from test_training import text   # noqa: F401 (fixture)

from peer_nb.files import read_json
from peer_nb.findings.results import load_runs
from peer_nb.running.command import main as peer_ablate
from peer_nb.running.train import main as peer_train
from peer_nb.study.plan import load_plan

ROOT = Path(__file__).parents[1]
SHIPPED = {path.stem: path for path in sorted((ROOT/"configs"/"experiments").glob("abl_*.yaml"))}
VALUES = {"abl_lora_rank": [4, 8, 16, 32, 64], "abl_context_length": [256, 512, 1024, 2048],
          "abl_target_modules": [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj"], ["q_proj", "v_proj", "fc1", "fc2"],
                                 ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]]}


@pytest.fixture
def file(text, bases, tmp_path) -> Path:
    "Two ranks on a tiny OPT, eight rows each"
    entry = [dict(name="sums", path=str(text))]
    hold = dict(lora_config=dict(target_modules=["qv"]), train_config=dict(max_tokens=256, per_device_train_batch_size=2, gradient_accumulation_steps=1,
                learning_rate=1e-2), dataset_config=dict(max_seq_length=32, datasets=entry, heldout_fraction=0.1), eval_config=dict(max_tokens=500, window=16))
    path = tmp_path/"rank.yaml"
    path.write_text(yaml.safe_dump(dict(name="rank", base=str(bases["opt"]), axis=dict(name="lora_rank", values=[2, 4], default=4), learning_rates=[1e-3, 1e-2],
                                        seeds=[1], primary=dict(metric="sums/bits_per_byte_reported"), hold=hold)))
    return path


@pytest.fixture(scope="module")
def mute(bases, tmp_path_factory) -> Path:
    "The same model without its tokenizer"
    return Path(shutil.copytree(bases["opt"], tmp_path_factory.mktemp("mute")/"opt", ignore=shutil.ignore_patterns("*token*")))


def test_the_shipped_files_are_those_of_the_requirement():
    files = {name: yaml.safe_load(path.read_text()) for name, path in SHIPPED.items()}
    assert {name: file["axis"]["values"] for name, file in files.items()} == VALUES
    for file in files.values(): assert len(file["seeds"]) >= 3 and file["base"] == "python:opt" and file["axis"]["default"] in file["axis"]["values"]


@pytest.mark.slow
def test_a_pinned_run_is_taken_over_by_the_sweep(file, tmp_path, capfd, monkeypatch):
    "And both are what peer-ablate makes of the same file; W&B is switched on by its variable, offline without a key"
    for name in ("WANDB_API_KEY", "WANDB_MODE"): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_PROJECT", "slm-lora-ablations")
    common = ["--config", str(file), "--output-dir", str(tmp_path/"out"), "--gpus", "0", "--parallel", "1"]
    assert peer_train([*common, "--lora_rank", "4"]) == 0
    said = capfd.readouterr().out
    assert "1 of 1 runs to do" in said and "not among the values" not in said
    pinned, = (tmp_path/"out").iterdir()
    assert [(c.levels, c.seed) for c in load_plan(pinned).cells] == [({"lora_rank": "4"}, 1)]
    run, = (pinned/"runs").iterdir()
    record, = run.glob("wandb/offline-run-*/*.wandb")
    begun = next(r.run for r in wandb_records(record) if r.WhichOneof("record_type") == "run")
    assert (begun.project, begun.run_group, begun.display_name) == ("slm-lora-ablations", pinned.name, "001-4-seed1")
    assert {"levels.lora_rank": "4"}.items() <= {u.key: json.loads(u.value_json) for u in begun.config.update}.items()
    monkeypatch.delenv("WANDB_PROJECT")
    words = [*common, "train_config.max_tokens=256"]
    assert peer_train(words) == 0
    said = capfd.readouterr().out
    assert "1 of 4 runs were computed before" in said and "3 of 4 runs to do" in said
    sweep = max((tmp_path/"out").iterdir(), key=lambda folder: (folder/"plan.json").stat().st_mtime_ns)
    assert peer_ablate(["--study", str(file), "--gpus", "0", "--output-dir", str(tmp_path/"again")]) == 0
    assert "4 of 4 runs were computed before" in capfd.readouterr().out
    rows = load_runs(sweep).rows
    assert set(rows.state) == {"DONE", "REUSE"}
    plain = load_plan(sweep).cells
    for cell, share in zip(plain, rows["trained/parameters"]): assert share == cell.parameters["trainable"] == int(cell.levels["lora_rank"])*2*2*64
    assert (rows["saved/bytes"] < 40_000).all() and rows["sums/bits_per_byte_chosen"].notna().all() and rows["sums/bits_per_byte_own"].notna().all()
    assert (rows["sums/bits_per_byte_reported"] != rows["sums/bits_per_byte_chosen"]).all()
    assert (sweep/"index.html").is_file()


def test_a_value_that_is_not_listed_is_allowed_and_said(file, tmp_path, capfd):
    from peer_nb.running.command import request_of_one_axis
    request = request_of_one_axis(file, [], "3")
    assert capfd.readouterr().out.strip() == f"lora_rank 3 is not among the values of {file} (2, 4)"
    assert request.study.axes == {"lora_rank": {"3": {"lora_config.rank": 3}}}


MISTAKES = {   # words, and what the one line says
    "another axis's option": (["--context_length", "512"], "varies lora_rank; pin it by --lora_rank VALUE"),
    "an architecture's name": (["--max_position_embeddings", "512"], "varies lora_rank"),
    "an option without its value": (["--lora_rank", "--seeds", "1"], "--lora_rank needs a value"),
    "no value before a base": (["--lora_rank", "base=x"], "--lora_rank needs a value"), "an empty value": (["--lora_rank", ""], "--lora_rank needs a value"),
    "two values": (["--lora-rank", "2", "--lora_rank", "4"], "--lora_rank: is given twice"), "the axis as a key": (["lora_config.rank=3"], "varies it; pin it by --lora_rank VALUE"),
    "a seed twice": (["--seeds", "1", "1"], "--seeds: 1, 1: a seed is there twice"), "a seed below 0": (["--seeds", "-1"], "-1 is not allowed"),
    "no tokens": (["--tokens", "0"], "--tokens 0: must be at least 1"), "no base": (["base="], "base= needs the name or the folder of a model"),
    "rank 0": (["--lora_rank", "0"], "0 is not allowed"), "rank above the width": (["--lora_rank", "33"], "choose 32 or less"),
    "an unmatched target": (["--lora_rank", "2", "lora_config.target_modules=[o_proj]"], "'o_proj' names no module of this opt model (near: "),
    "a base that is not there": (["base=/nowhere/at/all"], "no such folder"), "a base by another name": (["base=python:llama"], "are called python:opt, digits:opt"),
    "rows that do not fit": (["dataset_config.max_seq_length=128"], "reads 64 tokens"), "an unknown option": (["--lora_rankk", "2"], "did you mean"),
    "a base without a tokenizer": (["base=MUTE"], "holds no tokenizer"), "an architecture beside it": (["model_config.hidden_size=64"], "contradicts pretrained")}


@pytest.mark.parametrize("words,said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(words, said, file, mute, tmp_path, capfd):
    words = [word.replace("MUTE", str(mute)) for word in words]
    assert peer_train(["--config", str(file), "--output-dir", str(tmp_path/"out"), "--gpus", "0", *words]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("peer-train: error: ") and said in lines[0], lines
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("change,said", [
    (dict(seeds=[1, 1]), "has duplicates; a seed twice is the same run twice"),
    (dict(axis=dict(name="rank", values=[1], default=1)), "'rank' is no axis; known: lora_rank"), (dict(axis=dict(name="lora_rank", values=[1], default=2)), "2 is not among the values"),
    (dict(axis=[1]), "must be {name"), (dict(lr=[1]), "unknown key"), (dict(base=None), "base: is missing"), (dict(learning_rates=["fast"]), "'fast' is not allowed")])
def test_a_file_that_cannot_be_meant(change, said, file, capfd):
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    assert peer_train(["--config", str(file), "--gpus", "0"]) == 2
    err = capfd.readouterr().err
    assert said in err and str(file) in err


def test_an_ordinary_configuration_goes_to_the_loop(tmp_path, capfd):
    (tmp_path/"run.yaml").write_text("train_config: {max_steps: 1}\ndataset_config: {tokenizer_name: bytes}\n")
    assert peer_train(["--config", str(tmp_path/"run.yaml")]) == 2 and "dataset_config.datasets" in capfd.readouterr().err
    assert peer_train(["--config", str(tmp_path/"none.yaml")]) == 2 and "cannot be read" in capfd.readouterr().err
    assert peer_train(["--help"]) == 0 and "--merge CHECKPOINT OUT" in capfd.readouterr().out
