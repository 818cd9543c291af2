"""Frozen parts and loaded layers where several processes share a model."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from peer_nb.training.loop import main

SHARDED = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.training.freezing import freeze_model_layers
from peer_nb.training.layer_loading import PretrainedLayerLoader
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, max_position_embeddings=64, peer_start_layer=0,
    peer_config=dict(num_experts=256, product_key_dim=[16, 16], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="batch"),
    mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8))
folder = sys.argv[1]
dist.init_process_group("gloo")
torch.manual_seed(0)
source = PeerMLAForCausalLM(PeerMLAConfig(**TINY))
if dist.get_rank() == 0: source.save_pretrained(folder)
dist.barrier()
torch.manual_seed(1)
model = PeerMLAForCausalLM(PeerMLAConfig(**TINY))
for layer in model.model.layers: fully_shard(layer)
fully_shard(model)
before = {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in model.named_parameters()}
report = PretrainedLayerLoader(folder, {"*.memory": "*.memory"}).load(model)
assert report.moves and report.bytes_read < report.bytes_there
count = freeze_model_layers(model, {"*": "freeze", "*.memory": "train"}, strict=True)
after, theirs = dict(model.named_parameters()), dict(source.named_parameters())
assert any(isinstance(p, DTensor) for p in after.values())
assert count == sum(".memory." not in n for n in after)
for n, p in after.items():
    whole = p.full_tensor() if isinstance(p, DTensor) else p
    assert torch.equal(whole, theirs[n] if ".memory." in n else before[n]), n
    assert p.requires_grad == (".memory." in n), n
ids = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
model(input_ids=ids, labels=ids).loss.backward()
for n, p in model.named_parameters(): assert (p.grad is not None) == (".memory." in n), n
dist.barrier()
dist.destroy_process_group()
print("equal")
"""


@pytest.mark.slow
def test_layers_into_a_sharded_model(tmp_path):
    "Two processes hold half of each tensor; what was loaded, gathered, is the source's, and only the memory gets gradients"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, "-c", SHARDED, str(tmp_path/"source")], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=600)
        assert rank.returncode == 0 and "equal" in out, err[-3000:]


# ---- in a run ----

TINY = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=257, max_position_embeddings=32, peer_start_layer=0,
    peer_config=dict(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=8, query_norm="batch"),
    mla_config=dict(q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4))
FACTS = dict(name="facts", task="digit_lookup", task_arguments=dict(num_pairs=30, num_known=5, num_novel=5), mask="digit_lookup")


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A command that trains a tiny model in a folder of its own; gives the exit code"
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path/"cache"))
    config = dict(model_config=TINY, dataset_config=dict(datasets=[FACTS], tokenizer_name="bytes", max_seq_length=32), eval_config=dict(max_tokens=64),
        train_config=dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=4, save_steps=2, learning_rate=1e-2, save_total_limit=None, keep_optimizer_state=True))
    (tmp_path/"run.yaml").write_text(json.dumps(config))
    return lambda name, *words: main(["--config", str(tmp_path/"run.yaml"), "--output-dir", str(tmp_path/name), *words])


def weights(folder): return load_file(folder/"model.safetensors")


def test_a_run_trains_what_is_not_frozen_and_resumes_to_the_bit(run, tmp_path):
    frozen = 'train_config.freeze_layer_map={"*": "freeze", "*.memory": "train"}'
    assert run("whole", frozen) == 0
    start, end = (weights(tmp_path/"whole"/f"checkpoint-{step}") for step in (2, 4))
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    assert moved and all(".memory." in name for name in moved)
    shutil.copytree(tmp_path/"whole"/"checkpoint-2", tmp_path/"half"/"checkpoint-2")
    command = [sys.executable, "-c", "import sys; from peer_nb.training.loop import main; sys.exit(main())"]   # a new process
    subprocess.run([*command, "--config", str(tmp_path/"run.yaml"), "--output-dir", str(tmp_path/"half"), frozen, "--resume"], check=True)
    assert all(torch.equal(value, end[name]) for name, value in weights(tmp_path/"half"/"checkpoint-4").items())
    shutil.copytree(tmp_path/"whole"/"checkpoint-2", tmp_path/"other"/"checkpoint-2")
    assert run("other", 'train_config.freeze_layer_map=["lm_head"]', "--resume") == 2


def test_a_run_begins_with_layers_of_another_and_resumes_without_them(run, tmp_path, capsys):
    assert run("teacher") == 0
    taken = ["--checkpoint.pretrained_layer_path", str(tmp_path/"teacher"), "--checkpoint.pretrained_layer_step", "2",
             "--checkpoint.pretrained_layer_map", '{"component_mappings": {"model.layers.0.memory": "model.layers.1.memory"}}']
    kept = 'train_config.freeze_layer_map=["model.layers.1.memory"]'
    assert run("student", *taken, kept, "train_config.seed=7") == 0
    there, here = weights(tmp_path/"teacher"/"checkpoint-2"), weights(tmp_path/"student"/"checkpoint-4")
    assert all(torch.equal(value, here[name.replace("layers.0", "layers.1")]) for name, value in there.items() if name.startswith("model.layers.0.memory."))
    shutil.rmtree(tmp_path/"teacher")
    shutil.rmtree(tmp_path/"student"/"checkpoint-4")
    assert run("student", *taken, kept, "train_config.seed=7", "--resume") == 0
    assert all(torch.equal(value, here[name]) for name, value in weights(tmp_path/"student"/"checkpoint-4").items())


@pytest.mark.parametrize("words, said", [
    (['train_config.freeze_layer_map=["*.attn.k_proj"]'], "match no tensor"),
    (['train_config.freeze_layer_map=["*"]'], "nothing to train"),
    (["train_config.freeze_layer_map=missing.json"], "neither JSON nor a file"),
    (["train_config.pretrained_layer_map={}", "train_config.pretrained_layer_path=x"], "x does not exist|names nothing"),
    (["train_config.pretrained_layer_path=x"], "pretrained_layer_map: is missing")])
def test_mistakes_are_said_in_one_line_and_nothing_is_saved(words, said, run, tmp_path, capsys):
    assert run("bad", *words) == 2
    err = capsys.readouterr().err
    assert re.search(said, err) and "Traceback" not in err
    assert not list((tmp_path/"bad").glob("checkpoint-*"))
