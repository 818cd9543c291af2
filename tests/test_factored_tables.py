"Consumed tables with fused kernels: the run of the eager way, in which no table's gradient exists. Triton's interpreter on the CPU."
import copy
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed (it comes with the dev extra)")
pytest.importorskip("torchao", reason="torchao is not installed (it comes with the fp8 extra)")

from test_optim import assert_same, config    # noqa: E402

from peer_nb.files import UserError
from peer_nb.models.kernels import updates    # noqa: E402
from peer_nb.models.peer import MEMORY_KINDS, MemoryLayer    # noqa: E402
from peer_nb.training import table_optim    # noqa: E402
from peer_nb.training.loop import Trainer    # noqa: E402
from peer_nb.training.table_optim import TableAdamW    # noqa: E402

ROOT = Path(__file__).parent.parent
KINDS = [("peer", 1), ("peer", 2), ("pkm", 1), ("memory_plus", 2)]


@pytest.fixture
def counted(monkeypatch):
    "How many updates were made from factors"
    made, update = [], table_optim.adamw_factors
    monkeypatch.setattr(table_optim, "adamw_factors", lambda table, *rest, **keys: (made.append(table.shape), update(table, *rest, **keys)))
    return made


def trainer_of(folder, kernel, kind="peer", h=1, **train):
    "A model with one memory layer, whose tables have 4,096 numbers: enough for eight bits"
    cfg = config(folder, "consumed", per_device_train_batch_size=1, **train)
    m, p = cfg.model_config, cfg.model_config.peer_config
    m.memory_kind, m.num_hidden_layers, m.hidden_size, m.dropout, cfg.dataset_config.max_seq_length = kind, 1, 64, 0.0, 12
    p.expert_hidden_size, p.product_key_dim, p.num_heads, p.num_experts_per_tok = h, [8, 8 // h], 1, 2
    p.num_experts, p.query_norm = 64 // h, "layer"
    return with_kernel(Trainer(cfg), kernel)


def with_kernel(trainer, kernel):
    for layer in trainer.model.modules():
        if isinstance(layer, MemoryLayer): layer.kernel = kernel
    return trainer


def tables(trainer): return {name: p for p, name, _ in trainer.optimizer.tables()}


def assert_close(a, b, steps, rate):
    "Two runs that differ in the order in which a row's tokens are added: weights, moments, norms"
    for (name, p), q in zip(tables(a).items(), tables(b).values()):
        gap = (p - q).abs()
        assert gap.max() < 0.1 * rate * steps and gap.mean() < 1e-4 * rate * steps, (name, gap.max(), gap.mean())
        s, t = a.optimizer.state[p], b.optimizer.state[q]
        assert s.keys() == t.keys() and s["step"] == t["step"] and s["exp_avg"].dtype == t["exp_avg"].dtype == torch.uint8, name
        for key in ("exp_avg", "exp_avg_sq"):
            assert (s[key] != t[key]).float().mean() < 0.05, (name, key)    # neighbouring codes, where a number lies between two values
            read = [table_optim.read_moment(u[key], u[key + "_scale"], key == "exp_avg").view(-1, 256) / u[key + "_scale"][:, None] for u in (s, t)]
            assert (read[0] - read[1]).abs().mean() < 1e-3, (name, key)
            torch.testing.assert_close(s[key + "_scale"], t[key + "_scale"], rtol=1e-2, atol=1e-12, msg=lambda m: f"{name}.{key}: {m}")


@pytest.mark.parametrize("kind,h,steps", [("peer", 1, 2), *(pytest.param(*k, 20, marks=pytest.mark.slow) for k in KINDS)])
def test_a_run_from_factors_is_the_eager_run(kind, h, steps, tmp_path, counted):
    fused, eager = (trainer_of(tmp_path, kernel, kind, h) for kernel in ("triton", "eager"))
    for _ in range(steps):
        a, b = fused.step(), eager.step()
        assert a.loss == pytest.approx(b.loss, rel=1e-3) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-2)    # from 1e-7 it grows: Adam's step is nearly a sign
    assert len(counted) == steps * len(tables(fused))
    assert_close(fused, eager, steps, fused.train.table_learning_rate)


def test_a_stop_changes_nothing_and_a_checkpoint_moves_between_kernels(tmp_path, counted):
    "Three steps; two and one more after a restart, to the bit; and one more by the other kernel, from the same file"
    Path(tmp_path/"consumed").mkdir()
    ends = {}
    for kernel, other in (("triton", "eager"), ("eager", "triton")):
        first = trainer_of(tmp_path, kernel)
        for _ in range(2): first.step()
        folder = first.save()
        first.step()
        second, moved = (with_kernel(trainer_of(tmp_path, k), k) for k in (kernel, other))
        for t in (second, moved):
            t.restore(folder)
            t.step()
        assert_same(first.optimizer.state_dict(), second.optimizer.state_dict(), kernel)
        assert_same(first.model.state_dict(), second.model.state_dict(), kernel)
        assert_close(first, moved, 1, first.train.table_learning_rate)
        ends[kernel] = first
    assert_close(*ends.values(), 3, first.train.table_learning_rate)
    assert len(counted) == 2 * (3 + 1 + 1)


def test_factors_that_are_not_finite_change_nothing(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, "triton")
    trainer.step()
    (name, bad), (_, good) = tables(trainer).items()
    before = {p: (p.detach().clone(), copy.deepcopy(trainer.optimizer.state[p])) for p in (bad, good)}
    take = TableAdamW.take

    def spoiled(self, table, factors):
        if table.data_ptr() == bad.data_ptr(): factors.numbers[0, 0] = math.nan
        take(self, table, factors)

    monkeypatch.setattr(TableAdamW, "take", spoiled)
    result = trainer.step()
    after = trainer.optimizer.state[bad]
    assert bad.equal(before[bad][0]) and not good.equal(before[good][0]) and math.isfinite(result.grad_norm)
    assert after["skipped"] == after["skipped_in_row"] == 1 and all(torch.equal(v, after[k]) for k, v in before[bad][1].items() if isinstance(v, torch.Tensor))
    assert trainer.metrics_line(result)["skipped_tables"] == 1
    log = logging.getLogger("peer_nb")
    log.setLevel("CRITICAL")
    after["skipped_in_row"] = 9    # eight more
    with pytest.raises(UserError, match="not finite 10 times in a row"): trainer.step()
    log.setLevel("WARNING")
    assert bad.equal(before[bad][0])


# layers

def layers_of(kernel, count=1, kind="peer", **options):
    "Layers of width 256 that share tables of 16 rows, and the optimizer of these"
    torch.manual_seed(0)
    options = dict(num_experts=16, num_experts_per_tok=2, num_heads=1, product_key_dim=[4, 4], query_dim=8, query_norm="layer", table_gradient="consumed", kernel=kernel) | options
    layers = [MEMORY_KINDS[kind](256, **options)]
    layers += [MEMORY_KINDS[kind](256, **options, tables_of=layers[0]) for _ in range(count - 1)]
    params = [getattr(layers[0], name).weight for name in layers[0].table_names]
    optimizer = TableAdamW([dict(params=params, names=list(layers[0].table_names), table_gradient="consumed", lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)])
    return nn.Sequential(*layers), params, optimizer


def steps_of(kernel, run=None, steps=2, scale=1.0, **options):
    "Tables, norms of their gradients and gradients of the rest after some steps"
    model, params, optimizer = layers_of(kernel, **options)
    run = run(model) if run else model
    for _ in range(steps):
        for p in model.parameters(): p.grad = None
        x = torch.randn(1, 3, 256, requires_grad=True)
        with optimizer.consuming(0.5, scale): (scale * run(x).square().sum()).backward()
    assert all(p.grad is None for p in params)
    return [p.detach() for p in params], sorted(optimizer.table_norms), [x.grad / scale] + [p.grad / scale for p in model.parameters() if p.grad is not None]


def assert_steps(got, want):
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-6)
    for a, b in zip(got[0], want[0]): torch.testing.assert_close(a, b, rtol=0, atol=5e-4)
    for a, b in zip(got[2], want[2]): torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


def test_shared_tables_are_updated_once_with_all_of_their_gradient(counted):
    assert_steps(steps_of("triton", count=2), steps_of("eager", count=2))
    assert len(counted) == 4


def test_layers_are_repeated_and_losses_are_scaled():
    repeated = lambda model: lambda x: checkpoint(model, x, use_reentrant=False)
    got = steps_of("triton", repeated, count=2, scale=256.0)
    assert_steps(got, steps_of("eager", count=2))


def test_autocast_reads_the_tables_in_their_own_type():
    def halved(model): return lambda x: torch.autocast("cpu", torch.bfloat16)(model)(x)
    got, want = steps_of("triton", halved, steps=1), steps_of("eager", halved, steps=1)
    torch.testing.assert_close(got[1], want[1], rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("kind", ["pkm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("peer", "memory_plus"))])
def test_compiled_without_a_break(kind, counted):
    "The graph hands out factors; tables are updated at the end of the backward pass"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole = lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")
    got = steps_of("triton", whole, kind=kind, count=2)
    assert_steps(got, steps_of("eager", kind=kind, count=2))
    assert len(counted) == 2 * len(got[0]) and not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_outside_of_the_context_gradients_are_gradients(compiled):
    torch._dynamo.reset()
    model, params, optimizer = layers_of("triton")
    twin, others, _ = layers_of("eager")
    run, x = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model, torch.randn(1, 3, 256)
    with optimizer.consuming(1.0): out = run(x)
    with pytest.raises(RuntimeError, match="belongs with a backward pass inside"): out.sum().backward()
    before = [p.detach().clone() for p in params]
    run(x).sum().backward()
    twin(x).sum().backward()
    for p, q, b in zip(params, others, before):
        assert p.equal(b)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_what_the_optimizer_cannot_know_is_refused():
    model, params, optimizer = layers_of("triton")
    stranger = layers_of("triton")[0]
    with pytest.raises(RuntimeError, match="this optimizer doesn't have it"), optimizer.consuming(1.0): stranger(torch.randn(1, 3, 256)).sum().backward()
    with pytest.raises(RuntimeError, match="beside that of its memory layer"), optimizer.consuming(1.0): (model(torch.randn(1, 3, 256)).sum() + params[0].sum()).backward()
    assert not optimizer.factors


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_an_empty_batch_is_a_gradient_of_zeros(kind):
    "As without kernels: moments decay, weights too"
    ends = []
    for kernel in ("triton", "eager"):
        model, params, optimizer = layers_of(kernel, kind=kind)
        for tokens in (2, 0):
            with optimizer.consuming(1.0): model(torch.ones(1, tokens, 256)).sum().backward()
        ends.append((params[0].detach(), optimizer.table_norms))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=5e-4)
    assert ends[0][1] == ends[1][1] == [0.0] * len(ends[0][1])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_table_stays(frozen):
    model, params, optimizer = layers_of("triton")
    params[frozen].requires_grad_(False)
    group = optimizer.param_groups[0]
    group["params"], group["names"] = params[1 - frozen:2 - frozen], group["names"][1 - frozen:2 - frozen]    # as `parameter_groups` leaves it
    before = [p.detach().clone() for p in params]
    with optimizer.consuming(1.0): model(torch.randn(1, 3, 256)).sum().backward()
    assert [p.equal(b) for p, b in zip(params, before)] == [frozen == 0, frozen == 1]


def largest_allocation(kernel, kind, gradient):
    "Bytes of the largest tensor that a backward pass makes, anywhere in it, and of a table"
    model, params, optimizer = layers_of(kernel, kind=kind, num_experts=256, product_key_dim=[16, 16], table_gradient=gradient)
    optimizer.param_groups[0]["table_gradient"] = gradient
    for p in params: optimizer.state[p] = table_optim.moment_state(p)    # as after a first step
    with optimizer.consuming(1.0):
        out = model(torch.randn(1, 3, 256)).sum()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen: out.backward()
    sizes = [e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(sizes), params[0].numel() * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_no_tensor_of_a_tables_size_is_made(kind):
    made, table = largest_allocation("triton", kind, "consumed")
    assert made < table / 8
    made, table = largest_allocation("triton", kind, "dense")    # the measure sees one where there is one
    assert made >= table


TWO = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from test_factored_tables import layers_of
rank, store, kernel, dtype = int(sys.argv[1]), sys.argv[2], *sys.argv[4:]
dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)
x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(1))
mine = (x[:, :2], x[:, 2:])[rank]                                   # of different lengths
model, params, optimizer = layers_of(kernel, table_dtype=dtype)
torch.manual_seed(rank)                                             # the processes' own random numbers
with optimizer.consuming(0.5, scale=2.0, processes=dist.group.WORLD): (2 * model(mine).square().sum()).backward()
torch.save([[p.detach() for p in params], optimizer.table_norms], f'{store}.{rank}')
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel,dtype", [("triton", "float32"), ("triton", "bfloat16"), ("eager", "bfloat16")])
def test_two_processes_update_as_one(kernel, dtype, tmp_path):
    started = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path/"store"), str(Path(__file__).parent), kernel, dtype], cwd=ROOT, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in started: assert process.wait(timeout=600) == 0, process.stderr.read()
    (first, norms), (second, other) = (torch.load(tmp_path/f"store.{rank}", weights_only=True) for rank in range(2))
    assert norms == other and all(torch.equal(a, b) for a, b in zip(first, second))
    model, params, optimizer = layers_of("eager", table_dtype=dtype)
    x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(1))
    with optimizer.consuming(0.5): model(x).square().sum().backward()
    assert sorted(norms) == pytest.approx(sorted(optimizer.table_norms), rel=1e-3 if dtype == "float32" else 1e-2)
    for a, b in zip(first, params):
        off = ((a - b).abs() > (0 if dtype == "float32" else 2**-7 * b.abs()) + 5e-4).float().mean()    # bfloat16: beyond the next number
        assert off <= (0 if dtype == "float32" else 2e-3)    # where a gradient is nearly zero, the first step of Adam may go the other way


# formats

@pytest.mark.parametrize("shape,parts", [((6, 768), 1), ((32, 128), 1), ((13, 320), 1), ((24, 192), 2), ((5, 7), 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in (((16, 256), 1), ((64, 128), 2), ((64, 64), 1), ((16, 320), 5), ((9, 40), 2)))])
def test_any_width_from_factors_or_a_gradient(shape, parts):
    "The eager update, the kernel from a gradient and from factors: blocks in a row, over rows, or float32 where blocks do not fit"
    torch.manual_seed(0)
    group, start = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), torch.randn(shape)
    ends = [(start.clone(), table_optim.moment_state(start)) for _ in range(2)]
    for _ in range(2):
        index, numbers, vectors = torch.randint(0, shape[0], (3, 2)), torch.randn(3, 2*parts), torch.randn(3, shape[1] // parts)
        table_optim.adamw_8bit(ends[0][0], updates.factored_reference(index, numbers, vectors, shape[0]), ends[0][1], group, 0.7)
        table_optim.adamw_factors(ends[1][0], updates.factored(index, numbers, vectors, shape[0]), ends[1][1], group, 0.7)
    (one, s), (two, t) = ends
    torch.testing.assert_close(one, two, rtol=0, atol=2e-4)
    assert s.keys() == t.keys() and s["exp_avg"].dtype == (torch.uint8 if start.numel() >= 4096 and start.numel() % 256 == 0 else torch.float32)


def test_the_kernel_and_the_eager_update_of_a_gradient_agree_to_the_bit():
    "With the same gradient, the same arithmetic: torchao's, but for second moments that must not become zero"
    torch.manual_seed(0)
    group, one = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), torch.randn(16, 256)
    two, s, t = one.clone(), table_optim.moment_state(one), table_optim.moment_state(one)
    parts = (t[k] for k in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"))
    moments = updates.Moments(*parts, *(table_optim.code_values(signed, one.device) for signed in (True, False)))
    for step in range(1, 6):
        grad = torch.randn_like(one) * (torch.rand(16, 1) < 0.3)    # as a table gets it: most rows have none
        table_optim.adamw_8bit(one, grad, s, group, 0.5)
        t["step"] += 1
        updates.adamw_(two, grad, moments, torch.tensor(0.5), t["step"], 0, *(group[k] for k in ("lr", "betas", "eps", "weight_decay")))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    for key in ("exp_avg", "exp_avg_sq"): assert (s[key] != t[key]).sum() <= 4 and (s[key].int() - t[key].int()).abs().max() <= 1
    for key in ("exp_avg_scale", "exp_avg_sq_scale"): torch.testing.assert_close(s[key], t[key], rtol=1e-6, atol=0)


def test_a_bfloat16_table_is_rounded_the_same_way_again():
    "From factors: the float32 result, or one of its two neighbours; the same bits for the same seed"
    torch.manual_seed(0)
    group, start = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), torch.randn(16, 320).bfloat16()
    factors = updates.factored(torch.randint(0, 16, (3, 2)), torch.randn(3, 2), torch.randn(3, 320), 16)
    ends = []
    for table, seed in ((start.float(), 1), (start.clone(), 1), (start.clone(), 1), (start.clone(), 2)):
        table_optim.adamw_factors(table, factors, table_optim.moment_state(table), group, 0.7, seed)
        ends.append(table)
    assert torch.equal(ends[1], ends[2]) and not torch.equal(ends[1], ends[3])
    for got in ends[1:]: assert (got.float() - ends[0]).abs().le(2**-7 * ends[0].abs() + 1e-6).all()
    error = (torch.stack(ends[2:]).double() - ends[0].double()) / ends[0].abs()
    assert abs(error.mean()) < 5 * error.std() / error.numel()**0.5
