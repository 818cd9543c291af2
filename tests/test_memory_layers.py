"Memory layers: fast paths against definitions, a public implementation as oracle, two processes, tracing, very large tables"
import copy
import subprocess
import sys
import tracemalloc
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from scipy.stats import entropy
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peer_nb.models import product_keys
from peer_nb.analysis.usage_statistics import hot_rows, usage_statistics
from peer_nb.models.peer import MEMORY_KINDS, ExpertUsage, MemoryTable, ReadExperts, experts_reference, gather_dot, gather_dot_reference
from peer_nb.models.product_keys import (ProductKeyRouter, add_by_row, brute_force_top_k, by_row, gather_sum, numpy_may, product_top_k, search,
                                         sorted_top)

torch.set_num_threads(1)
SIZES = [[32, 32], [8, 16, 8], [4, 256], [2, 512], [4, 4, 4, 4], [3, 5, 7], [64, 3]]


def layer_of(kind="peer", sizes=(8, 8), k=4, heads=2, d=12, seed=0, **options):
    torch.manual_seed(seed)
    options = dict(query_norm="layer", query_dim=4*len(sizes)) | options
    return MEMORY_KINDS[kind](d, num_experts=prod(sizes), num_experts_per_tok=k, num_heads=heads, product_key_dim=list(sizes), **options)


def gradients(layer, x, g, mask=None):
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    out = layer(leaf, mask)
    out.backward(g)
    return {"output": out.detach(), "input": leaf.grad} | {n: p.grad for n, p in layer.named_parameters()}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want: torch.testing.assert_close(got[name].to_dense(), want[name].to_dense(), msg=lambda m: f"{name}: {m}", **tolerance)


@pytest.fixture
def plain(monkeypatch):
    "A function that turns the ways through numpy off"
    def turn_off():
        for name in ("product_keys", "peer"): monkeypatch.setattr(f"peer_nb.models.{name}.numpy_may", lambda *a, **k: False)
    return turn_off


# retrieval

@settings(max_examples=80, deadline=None)
@given(rows=st.integers(1, 20), n=st.integers(1, 700), k=st.integers(1, 20), levels=st.sampled_from([2, 5, 10**6]), seed=st.integers(0, 2**31))
def test_sorted_top_is_top_k(rows, n, k, levels, seed):
    k = min(k, n)
    a = torch.randint(0, levels, (rows, n), generator=torch.Generator().manual_seed(seed)).float() - 1
    got, columns = (torch.from_numpy(v) for v in sorted_top(a.numpy(), k))
    assert torch.equal(got, a.topk(k, -1).values)
    assert torch.equal(a.gather(1, columns), got)
    assert all(len(set(row)) == k for row in columns.tolist())


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_search_finds_the_float64_best(sizes, k):
    g = torch.Generator().manual_seed(k)
    query, keys = torch.randn(33, 3, 4*len(sizes), generator=g), torch.randn(3, sum(sizes), 4, generator=g)
    each = [torch.einsum("thc,hnc->thn", q, s) for q, s in zip(query.double().chunk(len(sizes), -1), keys.double().split(sizes, 1))]
    got, index = search(query, keys, sizes, k)
    torch.testing.assert_close(got.double(), brute_force_top_k(each, k)[0], rtol=0, atol=1e-5)
    total = each[0]
    for s in each[1:]: total = (total[..., :, None] + s[..., None, :]).flatten(-2)
    torch.testing.assert_close(total.gather(-1, index), got.double(), rtol=0, atol=1e-5)
    assert (index.sort(-1)[0].diff(dim=-1) > 0).all()


@pytest.mark.parametrize("tokens,heads", [(1, 1), (513, 2), (1030, 1), (2, 40)])
def test_search_in_blocks_is_search_at_once(tokens, heads, monkeypatch):
    query, keys = torch.randn(tokens, heads, 8), torch.randn(heads, 40, 4)
    whole = search(query, keys, [20, 20], 7)
    monkeypatch.setattr(product_keys, "BLOCK", 100)
    for a, b in zip(search(query, keys, [20, 20], 7), whole): torch.testing.assert_close(a, b)


def test_search_hits_every_row():
    sizes = [3, 5, 7]
    rows = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    query = torch.cat([F.pad(F.one_hot(rows[:, d], n).float(), (0, 7 - n)) for d, n in enumerate(sizes)], -1)[:, None]
    keys = torch.cat([torch.eye(7)[:n] for n in sizes])[None]
    assert torch.equal(search(query, keys, sizes, 1)[1].flatten(), torch.arange(105))


@pytest.mark.parametrize("sizes,shared", [([16, 16], False), ([4, 6, 5], True), ([9], False), ([4, 64], True)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu"])
def test_both_ways_of_routing_agree(sizes, shared, score, plain):
    torch.manual_seed(0)
    router = ProductKeyRouter(10, num_experts=prod(sizes), num_experts_per_tok=5, num_heads=3, product_key_dim=sizes, query_dim=4*len(sizes),
                              shared_keys=shared, score=score, query_norm="layer")
    x, g, results = torch.randn(50, 10, requires_grad=True), torch.randn(50, 3, 5), []
    for way in (lambda: None, plain):
        way()
        weights, index = router.route(x)
        results.append((weights, index, *torch.autograd.grad(weights, [x, *router.parameters()], g)))
    for got, want in zip(*results): torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_zero_scores_when_small_numbers_are_flushed():
    "Hidden places would be flushed too, so this machine state takes the plain way"
    if not torch.set_flush_denormal(True): pytest.skip("this processor doesn't flush")
    try:
        assert not numpy_may(torch.ones(1))
        index = layer_of().retrieve(torch.zeros(5, 2, 8))[1]
        assert (index.sort(-1)[0].diff(dim=-1) > 0).all()
    finally: torch.set_flush_denormal(False)


# reading and writing tables

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 50), d=st.integers(1, 33), tokens=st.integers(0, 9), places=st.integers(1, 7), wide=st.booleans(), seed=st.integers(0, 2**31))
def test_the_three_operations(n, d, tokens, places, wide, seed):
    g = torch.Generator().manual_seed(seed)
    kind, atol = (torch.float64, 1e-10) if wide else (torch.float32, 2e-5)
    index, weights = torch.randint(0, n, (tokens, places), generator=g), torch.randn(tokens, places, generator=g).double()
    table, x = torch.randn(n, d, generator=g).double(), torch.randn(tokens, d, generator=g).double()
    check = lambda got, want: torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
    check(gather_dot(table.to(kind), index, x.to(kind)), gather_dot_reference(table, index, x))
    check(gather_sum(table.to(kind), index, weights.to(kind)), torch.einsum("tp,tpd->td", weights, table[index]))
    want = torch.zeros(n, d).double().index_add_(0, index.flatten(), (weights[..., None] * x[:, None]).flatten(0, 1))
    check(add_by_row(by_row(index, n), weights.to(kind), x.to(kind)), want)
    check(add_by_row(by_row(index), weights.to(kind), x.to(kind)), want[index.unique()])


@pytest.mark.parametrize("kind", MEMORY_KINDS)
@pytest.mark.parametrize("options", [{}, dict(sizes=(3, 5, 4), k=3), dict(query_norm="batch", d=37), dict(score="sigmoid", shared_keys=True, k=1), dict(score="relu", activation="relu"),
                                     dict(expert_hidden_size=3, activation="silu")])
def test_fast_plain_sparse_and_dense_agree(kind, options, plain):
    if kind == "pkm": options = {k: v for k, v in options.items() if k != "expert_hidden_size"}
    dense, sparse = (layer_of(kind, table_gradient=t, **options) for t in ("dense", "sparse"))
    x, mask = torch.randn(2, 25, dense.hidden_size), torch.arange(25).expand(2, -1) > 2
    g = torch.randn_like(x)
    a, b = gradients(dense, x, g, mask), gradients(sparse, x, g, mask)
    assert_same(a, b, rtol=1e-5, atol=1e-6)
    chosen = dense.route(x.flatten(0, 1), mask.flatten())[1].unique()
    for name in dense.table_names:
        grad = b[f"{name}.weight"]
        assert grad.is_sparse and torch.equal(grad._indices()[0], chosen), "each row that was read once, in order"
        rest = torch.ones(dense.num_experts, dtype=torch.bool)
        rest[chosen] = False
        assert not a[f"{name}.weight"][rest].any(), "other rows exactly zero"
    fresh = layer_of(kind, **options)
    plain()
    assert_same(gradients(fresh, x, g, mask), a, rtol=1e-4, atol=1e-5)


def test_consumed_is_dense_where_nobody_collects():
    x, g = torch.randn(9, 12), torch.randn(9, 12)
    assert_same(gradients(layer_of(table_gradient="consumed"), x, g), gradients(layer_of(), x, g), rtol=0, atol=0)


def test_layers_that_share_tables_add_their_sparse_gradients():
    x, found = torch.randn(9, 12), []
    for kind in ("dense", "sparse"):
        owner = layer_of(table_gradient=kind)
        borrower = layer_of(seed=1, table_gradient=kind, tables_of=owner)
        (owner(x) * borrower(x)).sum().backward()
        found.append(owner.expert_up.weight.grad.to_dense())
    torch.testing.assert_close(*found)


def test_frozen_tables_get_no_gradient():
    layer, x = layer_of(), torch.randn(9, 12, requires_grad=True)
    for name in layer.table_names: getattr(layer, name).requires_grad_(False)
    layer(x).sum().backward()
    assert layer.expert_down.weight.grad is None and layer.expert_up.weight.grad is None
    assert x.grad.abs().sum() > 0 and layer.keys.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_the_same_gradient_twice(kind):
    x, g = torch.randn(64, 12), torch.randn(64, 12)
    layer = layer_of(kind, sizes=(4, 4))
    first, second = gradients(layer, x, g), gradients(layer, x, g)
    assert all(torch.equal(first[name], second[name]) for name in first)


class Largest(TorchDispatchMode):
    "Remembers how many numbers the largest tensor had that an operation returned"
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.layout == torch.strided and t.untyped_storage().nbytes() > 0: Largest.numbers = max(Largest.numbers, t.numel())
        return out


@pytest.mark.parametrize("kind", MEMORY_KINDS)
@pytest.mark.parametrize("table_gradient", ["dense", "sparse"])
def test_nothing_is_gathered(kind, table_gradient, plain):
    "Neither pass makes a tensor of [tokens, rows per token, width], on either way"
    tokens, places, d = 128, 4*8, 96
    layer = layer_of(kind, sizes=(16, 16), k=8, heads=4, d=d, table_gradient=table_gradient)
    x, g = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
    for way in (lambda: None, plain):
        way()
        with Largest(): layer(x).backward(g)    # what is imported at the first call doesn't count
        Largest.numbers = 0
        tracemalloc.start()
        with Largest(): layer(x).backward(g)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert Largest.numbers < tokens*places*d / 4 and peak < tokens*places*d    # numbers; bytes that numpy had


def test_tables_beyond_two_to_the_31_numbers():
    width = 256
    rows = 2**31 // width + 16
    try: table = torch.empty(rows, width)    # 8 GiB of addresses, of which a few pages are touched
    except RuntimeError: pytest.skip("no 8 GiB of addresses")
    index = torch.tensor([[rows - 1, 3], [rows - 2, rows - 1]])
    small, x = torch.randn(4, width), torch.randn(2, width)
    near = torch.tensor([[3, 0], [2, 3]])
    for row, n in zip(index.flatten().tolist(), near.flatten().tolist()): table[row] = small[n]
    want = experts_reference(small[near], small[near], x, torch.ones(2, 2), "gelu")
    leaf = table.requires_grad_()
    out = ReadExperts.apply(leaf, leaf.detach(), x, torch.ones(2, 2), index, "gelu", True)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert leaf.grad._indices()[0].tolist() == [3, rows - 2, rows - 1]


# the oracle

@pytest.mark.parametrize("table_gradient", ["dense", "sparse"])
def test_peer_is_the_public_implementations(table_gradient):
    theirs = pytest.importorskip("PEER_pytorch")
    torch.manual_seed(0)
    d, side, heads, k = 32, 24, 3, 5
    peer = theirs.PEER(d, heads=heads, num_experts=side**2, num_experts_per_head=k, dim_key=d//2, non_competing_scores=False)
    ours = layer_of(sizes=(side, side), k=k, heads=heads, d=d, query_dim=d, query_norm="none", table_gradient=table_gradient)
    with torch.no_grad():
        torch.nn.init.normal_(peer.keys)    # far apart, so that rounding chooses no other experts
        ours.query_proj.weight.copy_(peer.to_queries[0].weight.view(2, heads, d//2, d).transpose(0, 1).reshape(-1, d))
        ours.keys.copy_(peer.keys.permute(0, 2, 1, 3).flatten(1, 2))
        ours.expert_down.weight.copy_(peer.weight_down_embed.weight)
        ours.expert_up.weight.copy_(peer.weight_up_embed.weight)
    x, g = torch.randn(2, 40, d), torch.randn(2, 40, d)
    got, want = gradients(ours, x, g), gradients(peer, x, g)
    query = want["to_queries.0.weight"].view(2, heads, d//2, d).transpose(0, 1).reshape(-1, d)
    assert_same(got, {"output": want["output"], "input": want["input"], "sub_keys": want["keys"].permute(0, 2, 1, 3).flatten(1, 2), "query_proj.weight": query,
                      "expert_down.weight": want["weight_down_embed.weight"], "expert_up.weight": want["weight_up_embed.weight"]}, rtol=1e-4, atol=1e-4)


# tracing, other kinds of tensors

@pytest.mark.parametrize("kind", MEMORY_KINDS)
@pytest.mark.parametrize("table_gradient", ["dense", "sparse"])
def test_compiled_layers_compute_the_same(kind, table_gradient):
    torch._dynamo.reset()
    layer = layer_of(kind, table_gradient=table_gradient)
    x, g = torch.randn(9, 12), torch.randn(9, 12)
    want = gradients(layer, x, g)
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    out = torch.compile(layer, backend="aot_eager", fullgraph=True)(leaf)
    out.backward(g)
    got = {"output": out.detach(), "input": leaf.grad} | {n: p.grad for n, p in layer.named_parameters()}
    assert_same(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_tensors_without_numbers(kind):
    with torch.device("meta"):
        layer = layer_of(kind)
        assert layer(torch.randn(3, 5, 12)).shape == (3, 5, 12)
    with FakeTensorMode():
        layer = layer_of(kind)
        x = torch.randn(3, 5, 12, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_autocast_reads_tables_in_their_own_precision(kind):
    layer, x = layer_of(kind), torch.randn(40, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        layer(x).sum().backward()    # a backward pass inside is not usual, but must not read in 16 bits either
    inside = {n: p.grad.clone() for n, p in layer.named_parameters()}
    layer.zero_grad()
    assert out.dtype == torch.float32
    same = (layer.route(x)[1].sort(-1)[0] == autocast_route(layer, x).sort(-1)[0]).flatten(1).all(1)
    assert same.float().mean() > .5
    assert (out - layer(x))[same].abs().max() < .05 * layer(x).abs().max()
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    for name in layer.table_names: torch.testing.assert_close(getattr(layer, name).weight.grad, inside[f"{name}.weight"])


def autocast_route(layer, x):
    with torch.autocast("cpu", torch.bfloat16): return layer.route(x)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_other_kinds_of_number(kind, dtype):
    layer, x = layer_of(kind).to(dtype), torch.randn(20, 12, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    assert out.dtype == dtype and all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("kind", MEMORY_KINDS)
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_empty_batches(kind, norm):
    layer = layer_of(kind, query_norm=norm)
    for shape in ((0, 12), (0, 5, 12), (3, 0, 12)):
        x = torch.randn(shape, requires_grad=True)
        for mask in (None, torch.ones(shape[:-1]).bool()): assert layer(x, mask).shape == shape
        layer(x).sum().backward()
    assert all(p.grad is None or not p.grad.to_dense().any() for p in layer.parameters())
    if norm == "batch": assert layer.query_norm.num_batches_tracked == 0


@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_state_dict_round_trip(kind):
    one, two = layer_of(kind, query_norm="batch", d=37), layer_of(kind, query_norm="batch", d=37, seed=1)
    one(torch.randn(50, 37))
    two.load_state_dict(one.state_dict())
    x = torch.randn(5, 37)
    assert torch.equal(one.eval()(x), two.eval()(x))


def test_adapters_around_tables_take_part():
    peft = pytest.importorskip("peft")
    base = torch.nn.ModuleDict({"memory": layer_of()})
    base.forward = lambda x: base["memory"](x)
    x = torch.randn(7, 12)
    before = base(x).detach()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["expert_down", "expert_up"], init_lora_weights=False))
    adapted = model.base_model.model["memory"](x)
    assert (adapted - before).abs().max() > 1e-3
    merged = model.merge_and_unload()["memory"]
    assert isinstance(merged.expert_up, MemoryTable)
    torch.testing.assert_close(merged(x), adapted, rtol=1e-4, atol=1e-5)


# expert statistics

def test_counting_changes_nothing_and_can_be_stopped():
    layer, twin = layer_of(query_norm="batch"), layer_of(query_norm="batch")
    x, g = torch.randn(30, 12), torch.randn(30, 12)
    usage = layer.collect_usage()
    assert_same(gradients(layer, x, g), gradients(twin, x, g), rtol=0, atol=0)
    assert layer.state_dict().keys() == twin.state_dict().keys()
    assert usage.tokens == 30 and layer.collect_usage(False) is None
    layer(x)
    assert usage.tokens == 30


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 60), tokens=st.integers(1, 40), threshold=st.floats(1, 8), seed=st.integers(0, 2**31))
def test_usage_by_its_definition(n, tokens, threshold, seed):
    g = torch.Generator().manual_seed(seed)
    usage = ExpertUsage(n)
    index, weights = torch.randint(0, n, (tokens, 2, 3), generator=g), torch.rand(tokens, 2, 3, generator=g) + .01
    usage.add(weights, index)
    z = torch.zeros(n).double()
    for i, w in zip(index.flatten().tolist(), weights.flatten().tolist()): z[i] += w
    got = usage_statistics(usage.uses(), threshold)
    assert got["used"] == len(index.unique()) / n
    assert abs(got["unevenness"] - entropy(z, torch.ones(n))) < 1e-9
    share, hot = z / z.sum() * n, [found["row"] for found in hot_rows(usage.uses(), threshold, n)]
    assert set(hot) == set((share > threshold).nonzero().flatten().tolist()) and got["hot"] == len(hot)
    assert all(share[a] >= share[b] for a, b in zip(hot, hot[1:]))


# checkpointing and several processes

@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("table_gradient", ["dense", "sparse"])
def test_a_repeated_pass_is_the_same_pass(reentrant, table_gradient):
    one = layer_of(query_norm="batch", table_gradient=table_gradient)
    two = copy.deepcopy(one)
    two.collect_usage()
    x, g = torch.randn(30, 12), torch.randn(30, 12)
    want, leaf = gradients(one, x, g), x.clone().requires_grad_()
    checkpoint(two, leaf, use_reentrant=reentrant).backward(g)
    got = {"output": want["output"], "input": leaf.grad} | {n: p.grad for n, p in two.named_parameters()}
    assert_same(got, want, rtol=0, atol=1e-7)
    assert two.usage.tokens == 30 and two.query_norm.num_batches_tracked == 1


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from peer_nb.models.peer import PEER
torch.set_num_threads(1)
rank, where = int(sys.argv[1]), sys.argv[2]
def build():
    torch.manual_seed(0)
    return PEER(12, num_experts=64, num_experts_per_tok=4, num_heads=2, product_key_dim=[8, 8], query_dim=8, query_norm="batch").double()
x, g = torch.randn(4, 10, 12, generator=torch.Generator().manual_seed(1)).double(), torch.randn(4, 10, 12, generator=torch.Generator().manual_seed(2)).double()
mask = torch.arange(10).expand(4, -1) < torch.tensor([[10], [3], [7], [9]])
g = g * mask[..., None]
whole, leaf = build(), x.clone().requires_grad_()
want = whole(leaf, mask)
want.backward(g)
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
for parts in ((slice(0, 1), slice(1, 4)), (slice(0, 4), slice(4, 4))):    # uneven, and nothing at all for the second
    layer, mine = build(), parts[rank]
    part, real = x[mine].clone().requires_grad_(), mask[mine]
    parallel = DistributedDataParallel(layer)
    got = parallel(part, real)
    got.backward(g[mine])
    torch.testing.assert_close(got[real], want[mine][real], rtol=0, atol=1e-12)
    torch.testing.assert_close(part.grad[real], leaf.grad[mine][real], rtol=0, atol=1e-12)
    for (name, p), q in zip(layer.named_parameters(), whole.parameters()): torch.testing.assert_close(2*p.grad, q.grad, rtol=0, atol=1e-12, msg=name)
    for a, b in zip(layer.buffers(), whole.buffers()): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
dist.destroy_process_group()
print("equal")
"""


def test_batch_norm_over_two_processes_is_over_the_whole_batch(tmp_path):
    command = [sys.executable, "-c", TWO_PROCESSES]
    both = [subprocess.Popen([*command, str(rank), str(tmp_path/"meeting")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    outputs = [p.communicate(timeout=600) for p in both]
    for p, (out, err) in zip(both, outputs): assert p.returncode == 0 and out.strip() == "equal", err
