"Fused kernels against float64 and against the eager layers: in Triton's interpreter on the CPU, or on a GPU with --gpu"
import os
import random
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="triton is not installed (it comes with the dev extra)")

from peer_nb.models.kernels import ops, retrieval, rows, updates    # noqa: E402
from peer_nb.models.peer import MEMORY_KINDS    # noqa: E402
from peer_nb.models.product_keys import brute_force_top_k    # noqa: E402

ROOT = Path(__file__).parent.parent
DTYPES = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}    # largest difference, in units of the largest number
SIZES = [[32, 32], [8, 16, 8], [4, 256], [2, 80], [4, 4, 4, 4], [3, 5, 7], [64, 3], [9]]


@pytest.fixture(scope="module")
def device(request):
    "Where the kernels run"
    return torch.device("cuda" if request.config.getoption("--gpu") else "cpu")


@pytest.fixture
def poison(monkeypatch):
    "Memory that a kernel gets to write to holds NaN, and row numbers far outside"
    empty, like = torch.empty, torch.empty_like

    def fill(t): return t.fill_(torch.nan if t.is_floating_point() else 2**30)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(like(*a, **k)))


def close(got, want, dtype, what=""):
    "Within the rounding of one dtype of what float64 says"
    assert got.dtype in (dtype, torch.float32) and got.shape == want.shape, what
    assert got.isfinite().all(), what
    if want.numel(): assert (got.double() - want).abs().max() <= DTYPES[dtype] * want.abs().max() + 1e-30, what


def case(seed, device, **fixed):
    "Random shapes and numbers; some experts often, most never"
    r = random.Random(seed)
    c = dict(tokens=r.choice([1, 3, 6]), P=r.choice([1, 2, 5]), N=r.choice([1, 4, 12]), width=r.choice([1, 7, 16, 40]), parts=r.choice([1, 1, 3]),
             dtype=r.choice(list(DTYPES)), kind=r.choice(["gelu", "relu", "silu"]), long=r.choice([1, 3, 512])) | fixed
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(device, c["dtype"])
    c |= dict(down=draw(c["N"], c["width"]*c["parts"])/c["width"]**.5, up=draw(c["N"], c["width"]*c["parts"]), x=draw(c["tokens"], c["width"]),
              weights=draw(c["tokens"], c["P"]), grad=draw(c["tokens"], c["width"]))
    c["index"] = (torch.rand(c["tokens"], c["P"], generator=g)**3 * c["N"]).long().to(device)
    return c


def twin(c):
    "Output and gradients by gathering, in float64, of the very same numbers"
    leaves = [c[name].double().requires_grad_() for name in ("down", "up", "x", "weights")]
    out = rows.run_experts_reference(*leaves[:3], c["index"], leaves[3], c["kind"])
    return out.detach(), *torch.autograd.grad(out, leaves, c["grad"].double())


# experts

@pytest.mark.parametrize("seed", range(8))
def test_experts(seed, device, poison):
    c = case(seed, device)
    args = [c[name] for name in ("down", "up", "x", "index", "weights", "kind")]
    want = twin(c)
    out, pre = rows.run_experts(*args)
    close(out, want[0], c["dtype"], "output")
    by_row, pre_by_row = rows.run_experts_by_row(*args, long=c["long"])
    close(by_row, want[0], c["dtype"], "output of the forward by expert")
    torch.testing.assert_close(pre, pre_by_row, rtol=1e-4, atol=1e-5)
    found = rows.row_gradients(c["grad"], c["weights"], rows.segments(c["index"], c["N"], long=c["long"]), c["up"], c["x"], pre, c["kind"])
    by_token = rows.by_token(c["grad"], c["up"], c["index"], c["weights"], pre, c["kind"])
    close(found.down, want[1], c["dtype"], "input side")
    close(found.up, want[2], c["dtype"], "output side")
    for numbers in (found, by_token):
        close(rows.sum_rows(c["down"], c["index"], numbers.pre, c["dtype"]), want[3], c["dtype"], "input")
        close(numbers.weights.unflatten(1, (c["P"], -1)).sum(-1), want[4], torch.float32 if c["dtype"] == torch.float32 else c["dtype"], "weights")


@pytest.mark.parametrize("width", [768, 130])
def test_experts_of_the_models_width(width, device, poison):
    c = case(3, device, tokens=2, P=3, width=width, parts=1, N=9, dtype=torch.bfloat16)
    out, pre = rows.run_experts(*(c[name] for name in ("down", "up", "x", "index", "weights", "kind")))
    found, want = rows.row_gradients(c["grad"], c["weights"], rows.segments(c["index"], 9), c["up"], c["x"], pre, c["kind"]), twin(c)
    for got, w in zip((out, found.down, found.up), want): close(got, w, torch.bfloat16)
    assert out.shape == (2, width)


def test_all_tokens_on_one_expert(device, poison):
    c = case(0, device, tokens=20, P=2, N=6, width=12, parts=1, dtype=torch.float32, kind="gelu")
    c["index"] = torch.full_like(c["index"], 4)
    _, pre = rows.run_experts(*(c[name] for name in ("down", "up", "x", "index", "weights", "kind")))
    s = rows.segments(c["index"], 6, long=7)
    assert s.piece_count.max() == 6 and (s.end == s.begin).all()    # 40 pairs in pieces of 7
    found, want = rows.row_gradients(c["grad"], c["weights"], s, c["up"], c["x"], pre, "gelu"), twin(c)
    close(found.down, want[1], torch.float32)
    close(found.up, want[2], torch.float32)
    assert not found.up[:4].any() and not found.down[5:].any()


def test_empty_batches(device):
    c = case(1, device, tokens=3, P=4, N=5, width=8, parts=1, dtype=torch.float32, kind="relu")
    leaves = [c["down"].requires_grad_(), c["up"].requires_grad_(), c["x"][:0].requires_grad_(), c["weights"][:0].requires_grad_()]
    for sparse in (False, True):
        out = ops.read_experts(*leaves, c["index"][:0], "relu", sparse)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert out.shape == (0, 8) and not grads[0].to_dense().any() and grads[0].shape == c["down"].shape
    scores, index = ops.retrieve(torch.zeros(0, 2, 8, device=device), torch.zeros(2, 9, 4, device=device), [4, 5], 3)
    assert scores.shape == index.shape == (0, 2, 3)


def test_a_second_run_gives_the_same_bits(device):
    c = case(5, device, tokens=12, P=4, N=3, width=24, parts=1, dtype=torch.bfloat16, kind="silu")

    def once():
        leaves = [c[name].detach().clone().requires_grad_() for name in ("down", "up", "x", "weights")]
        out = ops.read_experts(*leaves, c["index"], "silu")
        return out, *torch.autograd.grad(out, leaves, c["grad"])

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


def test_segments_own_every_pair_once():
    for seed in range(30):
        r, g = random.Random(seed), torch.Generator().manual_seed(seed)
        N, long, shape = r.choice([1, 5, 300]), r.choice([1, 2, 7, 512]), (r.choice([1, 8, 40]), r.choice([1, 6]))
        index = (torch.rand(shape, generator=g)**4 * N).long()
        s = rows.segments(index, N, index.unique() if seed % 2 else None, long)
        items = [(int(s.rows[i]), b, e) for i, (b, e) in enumerate(zip(s.begin.tolist(), s.end.tolist()))]
        items += [(int(s.rows[i]), b, e) for i, b, e in zip(s.piece_row.tolist(), s.piece_begin.tolist(), s.piece_end.tolist())]
        seen = [(row, int(s.order[m])) for row, b, e in items for m in range(b, e)]
        assert sorted(pair for _, pair in seen) == list(range(index.numel()))
        assert all(index.flatten()[pair] == row for row, pair in seen)
        assert max(e - b for _, b, e in items) <= long


def test_tables_beyond_two_to_the_31(device):
    "Memory that is never touched is never taken"
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 20 * 2**30: pytest.skip("needs 20 GB of free GPU memory")
    N, width = 2**31 // 768 + 1000, 768
    table = torch.empty(N, width, dtype=torch.float16, device=device)
    assert table.numel() > 2**31
    last = torch.arange(N - 4, N, device=device).view(2, 2)
    table[last.flatten()] = torch.randn(4, width, device=device).half()
    w, g = torch.rand(2, 2, device=device).half(), torch.randn(2, width, device=device).half()
    close(rows.sum_rows(table, last, w), torch.einsum("tp,tpd->td", w.double(), table[last].double()), torch.float16)
    found = rows.row_gradients(g, w, rows.segments(last, N, last.flatten()), table)
    close(found.up, (w.double()[..., None] * g.double()[:, None]).flatten(0, 1), torch.float16)
    close(found.weights, torch.einsum("tpd,td->tp", table[last].double(), g.double()), torch.float16)


# values and retrieval

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparse", [False, True])
def test_values(seed, sparse, device, poison):
    c = case(seed + 100, device, parts=1)
    table, w = (c[name].requires_grad_() for name in ("up", "weights"))
    t64, w64 = (t.detach().double().requires_grad_() for t in (table, w))
    out, want = ops.values(table, w, c["index"], sparse), rows.sum_rows_reference(t64, c["index"], w64)
    close(out.detach(), want.detach(), c["dtype"])
    got = torch.autograd.grad(out, (table, w), c["grad"])
    if sparse: assert torch.equal(got[0].indices()[0], c["index"].unique())
    for a, b in zip(got, torch.autograd.grad(want, (t64, w64), c["grad"].double())): close(a.to_dense(), b, c["dtype"])


def full_scores(query, keys, sizes):
    "Of every sub-key, in float64"
    sets = keys.double().expand(query.shape[1], -1, -1).split(sizes, 1)
    return [torch.einsum("thc,hnc->thn", q, s) for q, s in zip(query.double().chunk(len(sizes), -1), sets)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_retrieval_is_exact(sizes, device, poison):
    r = random.Random(str(sizes))
    for dtype in r.sample(list(DTYPES), 1 if device.type == "cpu" else 3):
        k, width = min(r.choice([1, 3, 8, 16]), prod(sizes)), r.choice([5, 16, 40])
        g = torch.Generator().manual_seed(k)
        query, keys = (torch.randn(*shape, generator=g).to(device, dtype) for shape in ((3, 2, width*len(sizes)), (r.choice([1, 2]), sum(sizes), width)))
        got, index = retrieval.retrieve_rows(query, keys, sizes, k)
        each = full_scores(query, keys, sizes)
        torch.testing.assert_close(got.double(), brute_force_top_k(each, k)[0], rtol=1e-5, atol=1e-5)
        total = each[0]
        for s in each[1:]: total = (total[..., :, None] + s[..., None, :]).flatten(-2)
        torch.testing.assert_close(total.gather(-1, index), got.double(), rtol=1e-5, atol=1e-5)
        assert (index.sort(-1)[0].diff(dim=-1) > 0).all()


def test_retrieval_with_ties_infinities_and_nan(device):
    g = torch.Generator().manual_seed(0)
    query, keys = torch.randint(-1, 2, (16, 1, 4), generator=g).float().to(device), torch.randint(-1, 2, (1, 40, 2), generator=g).float().to(device)
    got, index = retrieval.retrieve_rows(query, keys, [20, 20], 9)
    assert torch.equal(got.double(), brute_force_top_k(full_scores(query, keys, [20, 20]), 9)[0])
    assert (index.sort(-1)[0].diff(dim=-1) > 0).all()
    assert torch.equal(index, retrieval.retrieve_rows(query, keys, [20, 20], 9)[1])
    query[:3, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    index = retrieval.retrieve_rows(query, keys, [20, 20], 9)[1]
    assert (index >= 0).all() and (index < 400).all()


def test_retrieval_gradients(device, poison):
    g = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(*shape, generator=g).to(device).requires_grad_() for shape in ((9, 2, 12), (2, 15, 4)))
    scores, index = ops.retrieve(query, keys, [4, 5, 6], 5)
    up = torch.randn(scores.shape, generator=g).to(device)
    q64, k64 = (t.detach().double().requires_grad_() for t in (query, keys))
    parts = full_scores(q64, k64, [4, 5, 6])
    want = sum(s.gather(-1, i) for s, i in zip(parts, (index // 30, index // 6 % 5, index % 6)))
    for a, b in zip(torch.autograd.grad(scores, (query, keys), up), torch.autograd.grad(want, (q64, k64), up.double())): close(a, b, torch.float32)


# layers

def layer_of(kind, device, kernel="triton", seed=0, **options):
    torch.manual_seed(seed)
    options = dict(num_experts=20, num_experts_per_tok=3, num_heads=2, product_key_dim=[4, 5], query_dim=8, query_norm="layer") | options
    return MEMORY_KINDS[kind](12, **options, kernel=kernel).to(device)


def gradients(layer, x, g, run=None):
    layer.zero_grad()
    leaf = x.detach().clone().requires_grad_()
    out = (layer if run is None else run)(leaf)
    out.backward(g)
    return {"output": out.detach(), "input": leaf.grad} | {n: p.grad for n, p in layer.named_parameters()}


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want: torch.testing.assert_close(got[name].to_dense(), want[name].to_dense(), msg=lambda m: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("kind,options", [("peer", dict(expert_hidden_size=2)), ("peer", dict(score="sigmoid", activation="relu", shared_keys=True)),
                                          ("pkm", {}), ("memory_plus", dict(expert_hidden_size=2))])
@pytest.mark.parametrize("table_gradient", ["dense", "sparse"])
def test_a_layer_is_the_eager_layer(kind, options, table_gradient, device):
    fused, eager = (layer_of(kind, device, kernel, table_gradient=table_gradient, **options) for kernel in ("triton", "eager"))
    x, g = torch.randn(2, 3, 12, device=device), torch.randn(2, 3, 12, device=device)
    got, want = gradients(fused, x, g), gradients(eager, x, g)
    assert_same(got, want, rtol=1e-4, atol=1e-6)
    assert {n for n, v in got.items() if v.is_sparse} == {n for n, v in want.items() if v.is_sparse}


def test_an_empty_batch_goes_through_a_layer(device):
    for kind in MEMORY_KINDS:
        layer = layer_of(kind, device)
        out = layer(torch.zeros(0, 5, 12, device=device))
        out.sum().backward()
        assert out.shape == (0, 5, 12)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_checkpointing_and_autocast(kind, device):
    layer, x, g = layer_of(kind, device), torch.randn(2, 3, 12, device=device), torch.randn(2, 3, 12, device=device)
    assert_same(gradients(layer, x, g, lambda v: checkpoint(layer, v, use_reentrant=False)), gradients(layer, x, g), rtol=0, atol=0)
    eager = layer_of(kind, device, "eager")
    with torch.autocast(device.type, torch.bfloat16): got, want = (m(x) for m in (layer, eager))
    assert got.dtype == x.dtype
    torch.testing.assert_close(got, want, rtol=.05, atol=.02)


@pytest.mark.parametrize("kind", list(MEMORY_KINDS))
def test_compiled_without_a_break(kind, device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer, x, g = layer_of(kind, device), torch.randn(2, 3, 12, device=device), torch.randn(2, 3, 12, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    assert_same(gradients(layer, x, g, compiled), gradients(layer, x, g), rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_opcheck(device):
    c = case(2, device, tokens=2, P=2, N=3, width=8, parts=1, dtype=torch.float32, kind="gelu")
    down, up, x, w, index, g = (c[name] for name in ("down", "up", "x", "weights", "index", "grad"))
    leaf = lambda t: t.detach().clone().requires_grad_()
    pre, numbers = torch.randn(2, 2, device=device), index.unique()
    query, keys = torch.randn(2, 1, 8, device=device), torch.randn(1, 5, 4, device=device)
    found = ops.retrieve(query, keys, [2, 3], 3)[1]
    calls = [(ops.experts, (leaf(down), leaf(up), leaf(x), leaf(w), index, "gelu", False, 99.)), (ops.experts, (down, up, leaf(x), leaf(w), index, "gelu", False, 0.)),
             (ops.experts_backward, (g, down, up, x, w, index, pre, "gelu", None)), (ops.experts_backward, (g, down, up, x, w, index, pre, "gelu", numbers)),
             (ops.experts_backward_frozen, (g, down, up, x, w, index, pre, "gelu")), (ops.values, (leaf(x), leaf(w), index % 2, False)),
             (ops.values_backward, (g, x, w, index % 2, None)), (ops.dots, (x, index % 2, g)), (ops.retrieve, (leaf(query), leaf(keys), [2, 3], 3)),
             (ops.retrieve_backward, (torch.randn(2, 1, 3, device=device), query, keys, found, [2, 3]))]
    taken = []
    with ops.collect_factors(lambda table, factors: taken.append(factors)):
        calls += [(ops.experts, (leaf(down), leaf(up), leaf(x), leaf(w), index, "gelu", False, 99., True)), (ops.values, (leaf(x), leaf(w), index % 2, False, True)),
                  (ops.experts_factors, (g, down, up, x, w, index, pre, "gelu", [True, True], False)), (ops.values_factors, (g, x, w, index % 2, True))]
        check(calls)
    assert taken


def check(calls):
    for op, args in calls:
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}, op


# choosing

def test_the_choice(device):
    x, layer = torch.randn(2, 12, device=device), layer_of("peer", device, "auto")
    taken = []
    for kernel in ("auto", "eager", "triton"):
        layer.kernel = kernel
        taken.append("experts" in type(layer(x).grad_fn.next_functions[0][0]).__name__ or "experts" in str(walk(layer(x).grad_fn)))
    assert taken == [device.type == "cuda", False, True]
    with pytest.raises(ValueError, match="choose one of auto, eager, triton"): layer_of("peer", device, "cutlass")
    with pytest.raises(ValueError, match="not torch.float64"): layer_of("peer", device).double()(x.double())


def walk(node, depth=6):
    "Names in a graph of gradients"
    return [] if node is None or not depth else [node.name(), *(n for nxt, _ in node.next_functions for n in walk(nxt, depth - 1))]


def run(code, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, capture_output=True, text=True)


def test_without_triton_and_without_interpreter():
    "The package works; who insists on kernels is told what is missing"
    done = run("""
import sys, torch
if sys.argv[-1] != 'with': sys.modules['triton'] = None
from peer_nb.models.peer import PEER
options = dict(num_experts=64, num_experts_per_tok=3, num_heads=2, product_key_dim=[8, 8], query_dim=8, query_norm='layer')
PEER(12, **options)(torch.randn(4, 12))
try: PEER(12, **options, kernel='triton')(torch.randn(4, 12))
except ValueError as e: print(e)
from peer_nb.models.kernels import ops
ops.HAS_TRITON = True
try: PEER(12, **options, kernel='triton')(torch.randn(4, 12))
except ValueError as e: print(e)
""")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "pip install triton" in first and "TRITON_INTERPRET=1" in second


def test_the_key_reaches_the_layer():
    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=16, peer_start_layer=0,
                 mla_config=dict(q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4))
    peer = dict(num_experts=16, product_key_dim=[4, 4], num_experts_per_tok=2, num_heads=1, query_dim=8)
    for kernel in ("auto", "eager", "triton"):
        model = PeerMLAForCausalLM(PeerMLAConfig(**small, peer_config=peer | dict(kernel=kernel)))
        assert model.model.layers[0].memory.kernel == kernel
    with pytest.raises(ValueError, match=r"allowed: auto \| eager \| triton"): PeerMLAForCausalLM(PeerMLAConfig(**small, peer_config=peer | dict(kernel="fast")))


# updates

def update_case(seed, device, dtype, long=2):
    g = torch.Generator().manual_seed(seed)
    index, numbers, vectors = torch.randint(0, 4, (5, 3), generator=g).to(device), torch.randn(5, 6, generator=g).to(device), torch.randn(5, 256, generator=g).to(device, dtype)
    return index, updates.factored(index, numbers, vectors, 4, long), updates.factored_reference(index, numbers.double(), vectors.double(), 4)


def no_moments(device):
    "Zero, with two lists of values that rise"
    line = torch.linspace(-1, 1, 256)
    signed, unsigned = line.sign()*line.abs()**3, torch.linspace(0, 1, 256)**4
    zero = int(signed.abs().argmin())
    codes = torch.full((4, 512), zero, dtype=torch.uint8)
    parts = codes, torch.zeros(8), torch.zeros_like(codes), torch.zeros(8), signed, unsigned
    return updates.Moments(*(t.to(device) for t in parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_from_factors_is_the_update_of_the_gradient(dtype, device, poison):
    tables, moments = [torch.ones(4, 512, device=device) for _ in range(2)], [no_moments(device) for _ in range(2)]
    for step in (1, 2):
        index, factors, grad = update_case(step, device, dtype)
        norm = updates.gradient_norm(factors, tables[0])
        torch.testing.assert_close(norm.double(), grad.norm(), rtol=1e-5, atol=0)
        factor = updates.clipping(norm, 1.0)
        updates.adamw_(tables[0], factors, moments[0], factor, step, 0, lr=.01, weight_decay=.1)
        updates.adamw_reference(tables[1], grad.float(), moments[1], factor.item(), step, lr=.01, weight_decay=.1)
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=2e-4)
    off = [(a.int() - b.int()).abs() for a, b in zip(moments[0], moments[1]) if a.dtype == torch.uint8]
    assert all(d.max() <= 1 and (d > 0).float().mean() < .01 for d in off)


def test_what_is_not_finite_is_not_written(device):
    table, moments = torch.ones(4, 512, device=device), no_moments(device)
    _, factors, _ = update_case(0, device, torch.float32)
    factors.vectors[1, 7] = torch.nan
    before = [t.clone() for t in moments]
    updates.adamw_(table, factors, moments, updates.clipping(updates.gradient_norm(factors, table), 1.0), 1, 0, lr=.01)
    assert (table == 1).all() and all(torch.equal(a, b) for a, b in zip(moments, before))


# benchmarks

@pytest.mark.parametrize("script,says", [("peer_gpu", "all agree with float64"), ("mla_gpu", "largest relative difference")])
def test_benchmarks_check_themselves(script, says):
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/f"{script}.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0 and says in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script,parts", [("mla_gpu", []), ("peer_gpu", [])])
def test_every_branch_of_a_benchmark_runs(script, parts):
    "At tiny sizes on the processor, so that a machine with a GPU is not spent on a mistake"
    kept = sorted((ROOT/"benchmarks").glob("*_gpu.json"))
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/f"{script}.py", "--tiny", *parts], capture_output=True, text=True)
    assert done.returncode == 0 and "every branch ran" in done.stdout, done.stderr
    assert kept == sorted((ROOT/"benchmarks").glob("*_gpu.json"))


@pytest.mark.parametrize("script", ["peer_gpu", "mla_gpu"])
@pytest.mark.slow
def test_benchmarks_without_a_gpu_say_so(script):
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/f"{script}.py"], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90_without_spilling():
    done = subprocess.run([sys.executable, ROOT/"benchmarks"/"peer_gpu.py", "--compile"], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if "registers" in line]
    assert done.returncode == 0 and len(lines) == 20, done.stderr
    assert all(" 0 bytes spilled" in line for line in lines), done.stdout


PARALLEL = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from peer_nb.models.peer import PEER
rank, way, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group('gloo', init_method='file://' + store, rank=rank, world_size=2)
torch.set_num_threads(1)
def build(kernel):
    torch.manual_seed(0)
    return PEER(8, num_experts=6, num_experts_per_tok=2, num_heads=1, product_key_dim=[2, 3], query_dim=8, query_norm='layer', kernel=kernel)
x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
whole = build('eager')
whole(x).square().mean().backward()
layer = build('triton')
if way == 'ddp': run = DistributedDataParallel(layer)
else: run = fully_shard(layer, mesh=init_device_mesh('cpu', (2,)))
run(x[2*rank:2*rank + 2]).square().mean().backward()
for (name, p), q in zip(layer.named_parameters(), whole.parameters()):
    grad = p.grad.full_tensor() if way == 'fsdp2' else p.grad
    torch.testing.assert_close(grad, q.grad, rtol=1e-4, atol=1e-7, msg=lambda m: name + m)
print('same')
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_get_the_gradients_of_one(way, tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", PARALLEL, str(rank), way, str(tmp_path/"store")], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in both:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0 and "same" in out, err
