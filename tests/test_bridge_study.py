"Studies of a bridge: planned, reused by hash, told from what they are, and run by their templates."
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tiny_bridge import write_ends

from peer_nb.analysis.parameters import count_bridge, model_width
from peer_nb.bridge.finished import finished_bridge
from peer_nb.bridge.study_tables import claim_lines, log_lines, plan_lines, read_told, study_of, told_lines, write_tables
from peer_nb.config import config_from_dict, load_config
from peer_nb.files import UserError, append_jsonl, read_json, read_jsonl
from peer_nb.running.register import Earlier
from peer_nb.running.reuse import HASHED, take, taken_over
from peer_nb.study.plan import make_plan, save_plan
from peer_nb.study.run import Result, Run
from peer_nb.study.study import load_study

ROOT = Path(__file__).parent.parent
BRIDGE = ROOT/"configs"/"bridge"


def planned(file: Path):
    "A study file's plan"
    study = load_study(file)
    return make_plan(study, load_config(study.base_config), where=str(file))


def finish(folder: Path, plan, **metrics):
    "A study's folder in which every run is done, with numbers that grow with the seed"
    folder.mkdir(exist_ok=True)
    save_plan(plan, folder)
    for cell in plan.cells:
        run = Run.of(folder, cell.id).make()
        append_jsonl(run.path("metrics"), {"step": 100, "eval/test/exact_match": .9})
        own = {name: value + .01*cell.seed for name, value in metrics.items()}
        Result(own, environment=dict(device="cpu"), training=dict(steps=900)).write(run.folder)
        run.write_status(state="DONE", exit_code=0, seconds=60.)


METRICS = {"bridge/test": .8, "test/exact_match": .7, "test_held_out/exact_match": .6, "bridge/test_held_out": .62, "bridge/over_best_single": .7, "bridge/over_cascade": -.2, "bridge/target_alone": .1,
           "bridge/source_alone": 0., "bridge/cascade": 1., "bridge/shuffled_source": .09, "bridge/zero_source": .08, "bridge/cache_saved_mb": -.02, "bridge/compression": 3.}


@pytest.mark.parametrize("file, runs", [("1_stability", 6), ("2_compression", 9), ("3_datasets", 3), ("4_inference", 3)])
def test_the_studies_of_the_needle_can_be_planned(file, runs):
    plan = planned(BRIDGE/f"{file}.yaml")
    assert len(plan.cells) == runs and all(cell.parameters["steps"] == 1200 and cell.tokens is None for cell in plan.cells)
    sizes = {cell.levels["experiment"]: cell.parameters["trainable"] for cell in plan.cells}
    assert all(size > 50_000 for name, size in sizes.items() if not name.startswith(("2a", "2b"))) and [*sizes.values()] == sorted(sizes.values(), reverse=True)


def test_2c_is_1a_by_its_hash(tmp_path):
    "The study's own reuse finds it: same identity, nothing declared"
    first, second = planned(BRIDGE/"1_stability.yaml"), planned(BRIDGE/"2_compression.yaml")
    finish(tmp_path/"first", first, **METRICS)
    taken = taken_over(second, [Earlier(tmp_path/"first")], "cpu")
    assert {cell.levels["experiment"] for cell in second.cells if cell.id in taken} == {"2c_8tok"} and len(taken) == 3
    assert {t.reason for t in taken.values()} == {HASHED} and not any(t.differs for t in taken.values())
    (tmp_path/"second").mkdir()
    save_plan(second, tmp_path/"second")
    for name, found in taken.items(): take(Run.of(tmp_path/"second", name), found)
    rows = {row["experiment"]: row["status"] for row in plan_lines(study_of(tmp_path/"second"))}
    assert rows == {"2c_8tok": "REUSE of 1a_stable, equal by hash", "2b_6tok": "TODO", "2a_4tok": "TODO"}


@pytest.fixture
def words(tmp_path, monkeypatch):
    "A folder where the large studies find their items: two problems, and two questions in the format of HotpotQA"
    for name in ("gsm8k", "hotpotqa"): (tmp_path/"data"/name).mkdir(parents=True)
    append_jsonl(tmp_path/"data"/"gsm8k"/"train.jsonl", dict(question="How many?", answer="2+2 = 4\n#### 4"))
    (tmp_path/"data"/"hotpotqa"/"hotpot_dev_distractor_v1.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file, names", [
    ("1_stability", ["1a_stable_64tok", "1b_baseline_64tok"]), ("2_compression", ["2c_stable_64tok", "2b_stable_48tok", "2a_stable_32tok"]), ("3_datasets", ["3a_hotpotqa_64tok"]), ("4_inference", ["4_inference_metrics"])])
def test_the_studies_of_mistral_and_llama_can_be_planned(words, file, names):
    "On a machine that has neither model: what is not known is open, and not guessed"
    plan = planned(BRIDGE/"mistral_llama"/f"{file}.yaml")
    assert [cell.levels["experiment"] for cell in plan.cells] == names
    if model_width("mistralai/Mistral-7B-Instruct-v0.3") is None: assert all(cell.parameters["total"] is None for cell in plan.cells)


def test_a_reported_run_is_in_the_tables_and_in_no_test(words):
    plan = planned(BRIDGE/"mistral_llama"/"1_stability.yaml")
    taken = taken_over(plan, [], "cuda", str(BRIDGE/"mistral_llama"/"1_stability.yaml"))
    (name, found), = taken.items()
    assert any("soft_tokens: 2048 there, 64 here" in text for text in found.differs) and "code and data: not known there" in found.differs
    finish(words/"study", plan, **METRICS)
    run = Run.of(words/"study", name)
    for path in run.folder.iterdir(): path.unlink()
    take(run, found)
    study = study_of(words/"study")
    told = read_told(BRIDGE/"mistral_llama"/"told.yaml")
    claim = next(line for line in claim_lines(study) if line["claim"] == "stability fixes work")
    assert claim["status"] == "INCONCLUSIVE" and "not usable" in claim["said"].text
    line = next(row for row in log_lines(study) if row["experiment"] == "1b_baseline_64tok")
    assert line["course"] == "0.815 → 0.360" and line["degradation"] == "0.455" and line["note"].text == "collapses: 0.455 below its peak at the end"
    assert [row["who"] for row in told_lines(study, told) if row["experiment"] == "1b_baseline_64tok"] == ["reported", "observed here"]
    page = write_tables(words/"index.html", [study], told).read_text()
    assert "is in no paired test" in page and "soft_tokens: 2048 there, 64 here" in page and "0.815" in page


def test_tables_are_counted_from_runs(tmp_path):
    "A study of known numbers, against means and differences by hand"
    plan = planned(BRIDGE/"1_stability.yaml")
    todo = study_of(BRIDGE/"1_stability.yaml")
    assert {row["status"] for row in plan_lines(todo)} == {"TODO"} and {c["status"] for c in claim_lines(todo)} == {"TODO"} and not log_lines(todo)
    finish(tmp_path/"study", plan, **METRICS)
    study = study_of(tmp_path/"study")
    plain, first = plan_lines(study)
    assert (first["status"], first["tokens"], first["seeds"], first["runtime"]) == ("✓ DONE", 8, 3, "3 min")
    assert first["stability"] == "InfoNCE, prompt alignment, RoPE projection, KL, early stopping" and plain["stability"] == "none"
    line = log_lines(study)[1]
    assert line["course"] == "0.900 → 0.720 ± 0.025" and line["degradation"].startswith("0.180")   # .71, .72, .73
    status = {c["claim"]: c["status"] for c in claim_lines(study)}
    assert status["the bridge beats both of its models"] == "SUPPORTED" and status["soft tokens carry more than text"] == "REFUTED"
    assert status["stability fixes work"] == "INCONCLUSIVE"   # both experiments have the same numbers
    assert "the text cascade is 0.20 above it" in line["note"].text and "0.70 above the better model alone (target)" in line["note"].text


def test_bad_places_are_refused(tmp_path):
    with pytest.raises(UserError, match="no study in this folder"): study_of(tmp_path)
    with pytest.raises(UserError, match="has no axis called experiment"): study_of(ROOT/"configs"/"demo_study.yaml")


@pytest.mark.parametrize("options, source, target", [(dict(), 64, 48), (dict(soft_tokens=3, depth=1, bottleneck=12, heads=3), 10, 7), (dict(depth=3, bottleneck=32), 8, 64)])
def test_translators_are_counted_as_they_are(options, source, target):
    from peer_nb.analysis.parameters import translator_parameters
    from peer_nb.bridge.translator import new_translator
    from peer_nb.schema import TranslatorConfig
    t = TranslatorConfig(**options)
    assert translator_parameters(t, source, target) == sum(p.numel() for p in new_translator(t, source, torch.ones(5, target)).parameters())
    plain = config_from_dict(dict(train_config=dict(max_steps=1), bridge_config=dict(translator=options)))
    assert count_bridge(plain.bridge_config)["total"] == translator_parameters(t, 64, 48)


# ---- the templates, on models that nobody has trained --------------------------------------------------------------------

@pytest.fixture
def tiny_ends(tmp_path): return write_ends(tmp_path)


def ablate(place: Path, *words) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PEER_NB_REGISTER": str(place/"register")}
    call = [sys.executable, "-c", "import sys; from peer_nb.running.command import main; sys.exit(main())", *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, env=env, timeout=900)


@pytest.mark.slow
def test_a_study_by_both_templates(tmp_path, tiny_ends):
    "Trained for three steps, asked by every arm; then asked again without training, found by what it is"
    base = dict(train_config=dict(max_steps=3, eval_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-3), bridge_config=dict(
        source=dict(model=str(tiny_ends/"source")), target=dict(model=str(tiny_ends/"target")), translator=dict(soft_tokens=4, depth=1, bottleneck=16, heads=2),
        data=dict(train_items=16, validation_items=4, test_items=4), evaluate=dict(max_new_tokens=2)))
    common = dict(base_config="base.yaml", axes=dict(experiment=dict(one={})), seeds=[1])
    (tmp_path/"base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path/"train.yaml").write_text(yaml.safe_dump(dict(name="few", notebook="bridge", primary=dict(metric="bridge/test", direction="maximize"), **common)))
    (tmp_path/"ask.yaml").write_text(yaml.safe_dump(dict(name="asked", notebook="bridge_inference", primary=dict(metric="inference/latency_saved_s", direction="maximize"), **common)))
    with pytest.raises(UserError, match="no finished run of this configuration with seed 1"): finished_bridge(config_from_dict(base | dict(train_config=base["train_config"] | dict(seed=1))), tmp_path/"out")
    done = ablate(tmp_path, "--study", tmp_path/"train.yaml", "--output-dir", tmp_path/"out", "--gpus", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    run, = (tmp_path/"out").glob("few-*/runs/*")
    lines, metrics = read_jsonl(run/"evaluation"/"samples.jsonl"), read_json(run/"result.json")["metrics"]
    assert len(lines) == 12*8 and len({line["arm"] for line in lines}) == 12
    share = lambda arm: pd.Series([line["em"] for line in lines if line["arm"] == arm and line["split"] == "test"]).mean()
    assert metrics["bridge/over_best_single"] == pytest.approx(share("latent") - max(share("source_alone"), share("target_alone")))
    cache = lambda arm: pd.Series([line["kv_mb_target"] + line["kv_mb_source"] for line in lines if line["arm"] == arm and line["split"] == "test"]).mean()
    assert metrics["bridge/cache_saved_mb"] == pytest.approx(cache("target_alone") - cache("latent")) and metrics["bridge/target_cache_saved_mb"] > metrics["bridge/cache_saved_mb"]
    row = pd.read_csv(next((tmp_path/"out").glob("few-*/ablation_results.csv"))).iloc[0]
    assert row["test/exact_match:peak"] >= row["test/exact_match"] and row["state"] == "DONE"
    done = ablate(tmp_path, "--study", tmp_path/"ask.yaml", "--output-dir", tmp_path/"out", "--gpus", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    asked = sorted((tmp_path/"out").glob("asked-*/runs/*"))[-1]
    single = read_jsonl(asked/"inference"/"samples.jsonl")
    assert {line["batch"] for line in single} == {1} and not (asked/"selected").exists()
    assert [line["pred"] for line in sorted(single, key=lambda l: (l["arm"], l["id"]))] == [line["pred"] for line in sorted(lines, key=lambda l: (l["arm"], l["id"]))]
