"""Frozen parts and loaded layers where several processes share a model."""
import os
import socket
import subprocess
import sys

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


def test_layers_into_a_sharded_model(tmp_path):
    "Two processes hold half of each tensor; what was loaded, gathered, is the source's, and only the memory gets gradients"
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", OMP_NUM_THREADS="1")
    ranks = [subprocess.Popen([sys.executable, "-c", SHARDED, str(tmp_path/"source")], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=240)
        assert rank.returncode == 0 and "equal" in out, err[-3000:]
