"The template that takes a memory apart, from a study's file to its claims, against its own log of single effects."
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from peer_nb.config import load_config
from peer_nb.files import read_json, read_jsonl
from peer_nb.study.identity import declared_metrics, find_template
from peer_nb.study.plan import make_plan
from peer_nb.study.study import load_study

ROOT = Path(__file__).parent.parent
BASE = dict(
    model_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=257, max_position_embeddings=48, memory_layers=[1], memory_kind="pkm",
                      peer_config=dict(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="layer"),
                      mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)),
    train_config=dict(max_steps=72, eval_steps=1000, logging_steps=20, per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, table_learning_rate=5e-2,
                      weight_decay=0.0),
    dataset_config=dict(tokenizer_name="bytes", max_seq_length=48, packing="varlen",
                        datasets=[dict(name="facts", task="digit_lookup", task_arguments=dict(num_pairs=4, num_known=4, num_novel=2, exposures=300), mask="digit_lookup")]),
    eval_config=dict(max_tokens=200))
STUDY = dict(name="few", base_config="base.yaml", notebook="memory", seeds=[1], axes=dict(memory={"values": {}}),
             primary=dict(metric="memory/one_row", direction="maximize"),
             claims=[dict(name="the memory is the cause", metric="memory/without_layer", direction="minimize", a=dict(memory="values"), b=0.5)])


@pytest.mark.slow
def test_a_study_of_the_memory_template_to_its_claims(tmp_path):
    "Its metrics, counted anew from the lines of single effects that it leaves"
    for name, content in (("base", BASE), ("study", STUDY)): (tmp_path/f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    words = ["--study", tmp_path/"study.yaml", "--output-dir", tmp_path/"out", "--gpus", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PEER_NB_REGISTER": str(tmp_path/"register")}
    done = subprocess.run([sys.executable, "-c", "import sys; from peer_nb.running.command import main; sys.exit(main())", *map(str, words)], capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    run, = (tmp_path/"out").glob("*/runs/*")
    metrics = read_json(run/"result.json")["metrics"]
    assert metrics["memory/known"] >= 2
    effects = pd.DataFrame(read_jsonl(run/"ablation"/"effects.jsonl"))
    whole, keys = effects[(effects.what == "layers") & (effects.key == "whole")], effects[effects.what == "keys"]
    assert metrics["memory/without_layer"] == whole.exact_after.sum() / whole.exact_before.sum()
    assert metrics["memory/strongest_nats"] == pytest.approx(keys.groupby("id").delta_logprob.min().mean())
    until = [e["until_loss"]["1"][0] for e in read_jsonl(run/"ablation"/"examples.jsonl") if e["exact"]]
    assert metrics["memory/one_row"] == until.count(1) / len(until)
    assert metrics["memory/keys_until_loss"] == pd.Series([n if n > 0 else 65 for n in until]).median()
    single = keys[keys.exact_before & ~keys.exact_after].id.nunique()
    assert single >= until.count(1)   # the first in the order of effect is one of those whose loss decides
    assert 0 <= metrics["memory/swap_collateral"] <= 1 and 0 <= metrics["memory/swap_efficacy"] <= 1
    table = pd.read_csv(next((tmp_path/"out").glob("*/ablation_results.csv")))
    assert table["memory/one_row"].tolist() == [metrics["memory/one_row"]]
    page = next((tmp_path/"out").glob("*/index.html")).read_text()
    assert "the memory is the cause" in page
    assert "Where the facts lie" in (run/"report.html").read_text() and (run/"ablation"/"index.html").is_file()


@pytest.mark.parametrize("file, cells", [("studies/where_facts_lie.yaml", 36), ("slurm/where_facts_lie.yaml", 144)])
def test_the_studies_of_where_facts_lie_can_be_planned(file, cells):
    study = load_study(ROOT/"configs"/"memory"/file)
    plan = make_plan(study, load_config(study.base_config), fingerprint=lambda config: "text")
    assert len(plan.cells) == cells


def test_the_template_measures_what_it_declares():
    declared = declared_metrics(find_template("memory"))
    source = "".join("".join(c["source"]) for c in json.loads(find_template("memory").read_text())["cells"])
    assert {"memory/one_row", "memory/keys_until_loss", "memory/swap_efficacy", "memory/swap_collateral"} <= {*declared}
    assert "record.write(run_dir)" in source
