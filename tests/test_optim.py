"Expert tables: the same run after a stop, the same sum in two processes, and nothing written that is not finite."
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from peer_nb.config import Config, ConfigError, DatasetConfig, DatasetEntry, EvalConfig, MLAConfig, ModelConfig, PeerConfig, TrainConfig, validate
from peer_nb.training.loop import Trainer
from peer_nb.training.optim import build_optimizer

KINDS = ("dense", "sparse", "consumed")


def config(folder: Path, kind: str, **train) -> Config:
    "Small, with tables that are large enough for eight bits"
    text = folder/"sums.jsonl"
    if not text.exists(): text.write_text("\n".join(json.dumps({"text": " ".join(f"{a} plus {b} is {a + b}." for b in range(9))}) for a in range(90)))
    keys = dict(output_dir=str(folder/kind), per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=1e-2, max_steps=6,
                logging_steps=3, log_level="error", table_learning_rate=2e-2, table_weight_decay=0.1, table_max_grad_norm=0.5) | train
    peer = PeerConfig(num_experts=256, product_key_dim=[16, 16], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="batch", table_gradient=kind)
    model = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=260, max_position_embeddings=64,
                        peer_start_layer=0, peer_config=peer, tie_word_embeddings=True, dropout=0.1, mla_config=MLAConfig(None, 16, 8, 16, 8))
    return Config(model, TrainConfig(**keys), DatasetConfig([DatasetEntry("sums", str(text))], "bytes", max_seq_length=32, heldout_fraction=0.1), EvalConfig())


def tables(trainer: Trainer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in trainer.model.named_parameters() if "expert_" in name}


def assert_same(a, b, where=""):
    "Equal to the bit, through dicts and lists"
    if isinstance(a, torch.Tensor): assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a: assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): assert_same(x, y, f"{where}[{i}]")
    else: assert a == b, where


CONTINUE = """
import sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_optim import KINDS, Trainer, config
folder = Path(sys.argv[1])
for kind in KINDS:
    trainer = Trainer(config(folder, kind))
    trainer.restore(folder/kind/"checkpoint-3")
    for _ in range(3): last = trainer.step()
    torch.save([trainer.model.state_dict(), trainer.optimizer.state_dict(), last.loss, last.grad_norm], folder/f"{kind}.pt")
"""


@pytest.mark.slow
def test_resume_in_a_new_process_is_bit_identical(tmp_path):
    "Six steps, against three and, in another process, three more: dense, sparse and consumed tables"
    ends = {}
    for kind in KINDS:
        trainer = Trainer(config(tmp_path, kind))
        Path(trainer.train.output_dir).mkdir()
        for _ in range(3): trainer.step()
        trainer.save()
        for _ in range(3): last = trainer.step()
        ends[kind] = [trainer.model.state_dict(), trainer.optimizer.state_dict(), last.loss, last.grad_norm]
    done = subprocess.run([sys.executable, "-c", CONTINUE, str(tmp_path), str(Path(__file__).parent)], env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind, end in ends.items(): assert_same(torch.load(tmp_path/f"{kind}.pt", weights_only=True), end, kind)
    moments = {kind: [s["exp_avg"] for s in end[1]["state"].values() if s["exp_avg"].shape[-1] == 32 and s["exp_avg"].numel() > 64*32] for kind, end in ends.items()}
    assert {m.dtype for m in moments["consumed"]} >= {torch.uint8} and not any(m.dtype == torch.uint8 for m in moments["dense"])


def test_accumulated_sparse_gradients_are_the_dense_ones(tmp_path):
    "Two batches a step: the first step of both, before their moments differ"
    ends = []
    for kind in ("dense", "sparse"):
        trainer = Trainer(config(tmp_path, kind, gradient_accumulation_steps=2, warmup_ratio=0.0, table_weight_decay=0.0, adam_epsilon=1e-12))
        result = trainer.step()
        ends.append((result.grad_norm, tables(trainer)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-5)
    for name, p in ends[0][1].items(): torch.testing.assert_close(ends[1][1][name], p, rtol=0, atol=5e-4, msg=lambda m: f"{name}: {m}")   # of a step of 0.02: nearly the gradient's sign


def test_a_table_with_a_bad_gradient_is_not_written(tmp_path, caplog):
    "The other tables and the dense part go on; the step counts as taken, and a line of metrics says how many tables were left out"
    trainer = Trainer(config(tmp_path, "consumed"))
    trainer.step()
    trainer.step()
    name, bad = next(iter(tables(trainer).items()))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    spoil = bad.register_hook(lambda grad: grad * math.nan)
    result = trainer.step()
    spoil.remove()
    assert {n for n, p in trainer.model.named_parameters() if p.equal(before[n])} == {name}
    assert math.isfinite(result.grad_norm) and trainer.counters.skipped == 0
    assert trainer.metrics_line(result)["skipped_tables"] == 1
    trainer.step()
    assert not bad.equal(before[name]) and bad.isfinite().all()


def test_no_gradient_outlives_the_backward_pass(tmp_path):
    "Seen by the dense part's own hooks, the last of which fires when all tables are done"
    trainer, seen = Trainer(config(tmp_path, "consumed")), []
    trainer.model.model.embed_tokens.weight.register_post_accumulate_grad_hook(lambda p: seen.extend(q.grad for q in tables(trainer).values()))
    trainer.step()
    assert seen == [None] * 4


def test_shared_tables_are_updated_once(tmp_path):
    "One table read by two layers: its gradient is whole before it is consumed"
    ends = []
    for kind in KINDS:
        cfg = config(tmp_path, kind, warmup_ratio=0.0, table_weight_decay=0.0, adam_epsilon=1e-12)
        cfg.model_config.share_memory = True
        trainer = Trainer(cfg)
        trainer.step()
        ends.append(tables(trainer))
        assert len(ends[-1]) == 2
    for name, p in ends[0].items():
        for other in ends[1:]: torch.testing.assert_close(other[name], p, rtol=1e-3, atol=1e-4)


def test_float16_scales_are_undone(tmp_path):
    "A scaler that multiplies the loss by 1,024 changes nothing of what tables get"
    ends = []
    for factor in (None, 1024.0):
        trainer = Trainer(config(tmp_path, "consumed"))
        if factor: trainer.scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        for _ in range(3): trainer.step()
        ends.append(trainer.model.state_dict())
    for name, value in ends[0].items(): torch.testing.assert_close(ends[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")


def test_consumed_needs_one_batch_a_step(tmp_path):
    with pytest.raises(ConfigError, match="gradient_accumulation_steps must be 1"): validate(config(tmp_path, "consumed", gradient_accumulation_steps=2))


def test_groups_of_a_model(tmp_path):
    "Every parameter once; norms and the embedding do not decay; the tables' rule is theirs alone"
    model = Trainer(config(tmp_path, "sparse")).model
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3, table_weight_decay=0.2, table_learning_rate=0.5), "sparse")
    names = {id(p): n for n, p in model.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert sorted(n for found in groups.values() for n in found) == sorted(names.values())
    assert {n.rsplit(".", 2)[-2] for n in groups["tables"]} == {"expert_down", "expert_up"}
    assert all("norm" in n or "embed" in n or n.endswith("bias") for n in groups["vectors"]) and not any("norm" in n for n in groups["matrices"])
    assert {g["name"]: (g["lr"], g["weight_decay"], g.get("table_gradient")) for g in optimizer.param_groups} == {
        "matrices": (5e-5, 0.3, None), "vectors": (5e-5, 0.0, None), "keys": (0.5, 0.2, None), "tables": (0.5, 0.2, "sparse")}


TWO = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from peer_nb.training.table_optim import TableAdamW, gather_sparse
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(rank)
found = {}
for name, count in (("some", 5 + 4*rank), ("none", 3*rank)):   # the first process may have read nothing
    rows = torch.randint(0, 40, (count,))
    mine = torch.sparse_coo_tensor(rows[None], torch.randn(count, 8), (40, 8))
    both = gather_sparse(mine)
    found |= {name: both, name + " mine": mine.to_dense()}
torch.manual_seed(7)
table = nn.Parameter(torch.randn(64, 128))
optimizer = TableAdamW([dict(params=[table], names=["table"], table_gradient="consumed", lr=0.01, weight_decay=0.0)])
with optimizer.consuming(1.0, processes=dist.group.WORLD): ((rank + 1) * table).sum().backward()
found |= {"table": table.detach(), "norms": optimizer.table_norms}
whole = torch.randn(64, 128)
shards = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)]))
plain = nn.Parameter(whole.clone())
for p in (shards, plain):
    optimizer = TableAdamW([dict(params=[p], names=["table"], table_gradient="consumed", lr=0.01, weight_decay=0.1)])
    for step in range(3):
        with optimizer.consuming(0.5): (p * p).sum().backward()
    found[f"norms {p is shards}"] = optimizer.table_norms
found |= {"shards": shards.full_tensor().detach(), "plain": plain.detach(), "codes": [optimizer.state[p]["exp_avg"].dtype]}
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_sum_their_gradients(tmp_path):
    "Sparse: rows and values gathered. Consumed: summed before the norm is taken; sharded: each process its rows, one norm"
    started = [subprocess.Popen([sys.executable, "-c", TWO, str(tmp_path), str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in started:
        error = process.communicate(timeout=600)[1]
        assert process.returncode == 0, error
    first, second = (torch.load(tmp_path/f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("some", "none"):
        assert first[name].is_coalesced() and torch.equal(first[name].indices(), second[name].indices()) and torch.equal(first[name].values(), second[name].values())
        torch.testing.assert_close(first[name].to_dense(), first[name + " mine"] + second[name + " mine"])
    assert torch.equal(first["table"], second["table"]) and first["norms"] == second["norms"] == pytest.approx([3 * math.sqrt(64 * 128)], rel=1e-5)
    assert first["norms True"] == second["norms True"] == pytest.approx(first["norms False"], rel=1e-6)
    torch.testing.assert_close(first["shards"], first["plain"], rtol=1e-6, atol=1e-7)
