"Expert tables in bfloat16: they learn as float32 ones do, stop and go on to the bit, and are loaded as they were saved."
from pathlib import Path

import pytest
import torch
from test_optim import assert_same, config

from peer_nb.analysis.parameters import count_parameters
from peer_nb.analysis.step_memory import estimate_memory
from peer_nb.config import apply_overrides, load_config
from peer_nb.models.causal_lm import PeerMLAForCausalLM
from peer_nb.models.peer import MEMORY_KINDS, MemoryTable
from peer_nb.training import table_optim
from peer_nb.training.loop import Trainer
from peer_nb.training.table_optim import rounding_seed

ROOT = Path(__file__).parent.parent
KINDS = ("dense", "sparse", "consumed")


def trainer_of(folder, gradient, dtype="bfloat16", kind="peer", **train):
    if gradient == "consumed": pytest.importorskip("torchao")
    cfg = config(folder, gradient, **train)
    cfg.model_config.peer_config.table_dtype, cfg.model_config.memory_kind = dtype, kind
    return Trainer(cfg)


def tables(model): return {name: module.weight for name, module in model.named_modules() if isinstance(module, MemoryTable)}


@pytest.mark.parametrize("gradient", KINDS)
@pytest.mark.parametrize("kind", ["peer", pytest.param("memory_plus", marks=pytest.mark.slow), pytest.param("pkm", marks=pytest.mark.slow)])
def test_a_run_learns_as_in_float32(gradient, kind, tmp_path):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_of(tmp_path, gradient, dtype, kind, max_steps=60)
        losses[dtype] = [trainer.step().loss for _ in range(60)]
        assert all(p.dtype == getattr(torch, dtype) for p in tables(trainer.model).values())
        assert {p.dtype for name, p in trainer.model.named_parameters() if "expert_" not in name and "values" not in name} == {torch.float32}
    half, full = (sum(losses[dtype][-10:]) / 10 for dtype in ("bfloat16", "float32"))
    assert abs(half - full) < 0.1 and half < losses["bfloat16"][0] - 2


@pytest.mark.parametrize("gradient", KINDS)
def test_small_updates_arrive_on_average(gradient, tmp_path, monkeypatch):
    "A rate whose steps are lost by rounding to the nearest number moves the tables as far as in float32"
    moved = {}
    for name, dtype in (("float32", "float32"), ("stochastic", "bfloat16"), ("nearest", "bfloat16")):
        if name == "nearest": monkeypatch.setattr(table_optim, "rounded", lambda x, dtype, generator=None: x.to(dtype))
        trainer = trainer_of(tmp_path, gradient, dtype, table_learning_rate=1e-6, table_weight_decay=0.0, warmup_ratio=0.0, lr_scheduler_type="constant")
        before = {n: p.detach().double().clone() for n, p in tables(trainer.model).items()}
        for _ in range(6): trainer.step()
        moved[name] = {n: p.detach().double() - before[n] for n, p in tables(trainer.model).items()}
    for n, full in moved["float32"].items():
        read = full.abs() > 1e-7
        along = lambda x: (x[n] * full.sign())[read].mean().item()
        assert along(moved["stochastic"]) == pytest.approx(along(moved["float32"]), rel=0.5)
        assert abs(along(moved["nearest"])) < 0.2 * along(moved["float32"])


@pytest.mark.parametrize("gradient", KINDS)
def test_a_stop_changes_nothing(gradient, tmp_path):
    (tmp_path/gradient).mkdir()
    first = trainer_of(tmp_path, gradient)
    for _ in range(2): first.step()
    folder = first.save()
    first.step()
    second = trainer_of(tmp_path, gradient)
    second.restore(folder)
    second.step()
    assert_same(first.model.state_dict(), second.model.state_dict())
    assert_same(first.optimizer.state_dict(), second.optimizer.state_dict())


def test_rounding_uses_nobody_elses_numbers(tmp_path):
    trainer = trainer_of(tmp_path, "dense")
    for p in trainer.model.parameters(): p.grad = torch.zeros_like(p)
    before = torch.get_rng_state()
    trainer.optimizer.step()
    assert torch.get_rng_state().equal(before)
    assert len({rounding_seed(name, step, seed) for name in ("a", "b") for step in range(50) for seed in range(5)}) == 500


def test_saved_and_loaded(tmp_path):
    model = trainer_of(tmp_path, "dense").model.eval()
    ids = torch.randint(0, 256, (1, 8))
    want = model(input_ids=ids).logits
    model.save_pretrained(tmp_path/"model")
    again = PeerMLAForCausalLM.from_pretrained(tmp_path/"model")
    assert {name: p.dtype for name, p in again.named_parameters()} == {name: p.dtype for name, p in model.named_parameters()}
    assert torch.equal(again.eval()(input_ids=ids).logits, want)


@pytest.mark.parametrize("kind", list(MEMORY_KINDS))
@pytest.mark.parametrize("gradient", KINDS)
def test_a_layer_with_kernels_is_the_eager_one(kind, gradient):
    pytest.importorskip("triton")
    found = []
    for kernel in ("triton", "eager"):
        torch.manual_seed(0)
        layer = MEMORY_KINDS[kind](16, num_experts=12, num_experts_per_tok=2, num_heads=1, product_key_dim=[3, 4], query_dim=8, query_norm="layer",
                                   table_dtype="bfloat16", table_gradient=gradient, kernel=kernel)
        out = layer(torch.randn(1, 4, 16))
        out.square().sum().backward()
        assert out.dtype == torch.float32
        found.append([out.detach(), *(p.grad.to_dense().float() for p in layer.parameters())])
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item() + 1e-6)


def test_what_it_takes():
    "The guide's model: the same numbers, half of the tables' bytes"
    base = load_config(ROOT/"configs"/"config.yaml")
    half = apply_overrides(base, {"model_config.peer_config.table_dtype": "bfloat16"})
    count = count_parameters(base.model_config)
    assert count_parameters(half.model_config) == count
    assert estimate_memory(base).weights - estimate_memory(half).weights == 2 * count.memory_tables
