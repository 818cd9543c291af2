"""PEER and product-key memory on one GPU: the fused kernels beside the eager layer, torch.compile and PEER-pytorch.

    pip install PEER-pytorch==0.2.2                 # the comparison with it is left out, and said so, where it is missing
    python benchmarks/peer_gpu.py                   # on a GPU; writes benchmarks/peer_gpu.json
    python benchmarks/peer_gpu.py --only headline   # the shape of the floors; a few minutes
    python benchmarks/peer_gpu.py --check           # without a GPU: every kernel against float64 at tiny shapes, in Triton's interpreter
    python benchmarks/peer_gpu.py --compile         # without a GPU: every kernel compiled for sm_90, its registers and spills
    python benchmarks/peer_gpu.py --tiny            # without a GPU: every branch of the measurement once at tiny sizes; nothing is kept

Index and scores are given to the expert part; retrieval is timed apart. Times are medians of CUDA events, variants in turns.
Before each timed call a large buffer is overwritten, so that no table row is found in the cache. Bytes are those that a
pass must move at least; bytes over time are set against a copy of 4 GiB that the same run times. The whole step trains the
model of configs/one_h200.yaml on random tokens, as the training loop does."""
import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

ROOT = Path(__file__).parent.parent
DEVICE = "cuda"                                     # --tiny: cpu
PARTS = ["headline", "sweep", "retrieval", "update", "peer-pytorch", "step"]
PEER_VERSION = "0.2.2"
HEADLINE = dict(width=768, experts=1024**2, heads=8, top_k=16, tokens=32768, parts=1)
SWEEP = [HEADLINE | change for change in (
    [dict(experts=side**2) for side in (128, 256, 512, 2048)] + [dict(tokens=n) for n in (1024, 8192, 65536)]
    + [dict(width=w, experts=512**2) for w in (256, 1536, 4096)] + [dict(heads=4, top_k=32, kind="pkm")])]
TINY = dict(width=24, experts=16, heads=1, top_k=3, tokens=4, parts=1)
TINY_SWEEP = [TINY | dict(tokens=3), TINY | dict(kind="pkm")]
TINY_MODEL = {"model_config.hidden_size": 32, "model_config.num_hidden_layers": 3, "model_config.num_attention_heads": 2, "model_config.intermediate_size": 32,
              "model_config.vocab_size": 64, "model_config.max_position_embeddings": 16, "model_config.loss_chunk_size": 4, "dataset_config.max_seq_length": 8,
              "train_config.per_device_train_batch_size": 1, "model_config.peer_config.num_experts": 16, "model_config.peer_config.product_key_dim": [4, 4],
              "model_config.peer_config.num_experts_per_tok": 2, "model_config.peer_config.num_heads": 1, "model_config.peer_config.query_dim": 8,
              "model_config.peer_config.kernel": "triton", "model_config.mla_config.q_lora_rank": 8, "model_config.mla_config.kv_lora_rank": 8,
              "model_config.mla_config.qk_rope_head_dim": 4, "model_config.mla_config.qk_nope_head_dim": 4, "model_config.mla_config.v_head_dim": 4}
KERNELS_AT = dict(P="i32", D="i32", T="i32", H="i32", C="i32", SET_STRIDE="i32", k="i32", WIDTH_ALL="i32", total="i32", seed="i32", size="i64",
                  **dict.fromkeys(("lr", "weight1", "weight2", "eps", "decay", "correct1", "correct2"), "fp32"))
POINTERS = dict.fromkeys(("index", "order", "rows", "begin", "end", "piece_row", "piece_count", "piece_first", "out_rows"), "*i64")
POINTERS |= dict.fromkeys(("pre", "grad_pre", "grad_weights", "products", "pieces", "numbers", "sums", "scale1", "scale2", "signed", "unsigned", "factor",
                           "out_scores"), "*fp32") | dict(ranks="*i32")


def machine(torch):
    "Processor, GPU, driver and versions; no names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    found = dict(cpu=names[0] if names else platform.processor(), cores=os.cpu_count(), system=platform.system(), python=platform.python_version(),
                 torch=torch.__version__, cuda=torch.version.cuda)
    try: found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError: found["triton"] = None
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"], capture_output=True, text=True)
        found |= dict(gpu=p.name, gpu_memory_gib=round(p.total_memory / 2**30, 1), processors=p.multi_processor_count, cache_mib=round(p.L2_cache_size / 2**20, 1),
                      capability=f"{p.major}.{p.minor}", driver_and_clocks=driver.stdout.strip().splitlines()[:1])
    return found


def floors(c, touched):
    "Bytes that each pass must move at least (bfloat16 tables), by what is reused"
    pairs, row = c["tokens"] * c["heads"] * c["top_k"], 2 * c["width"] * c["parts"]
    tables = 1 if c.get("kind") == "pkm" else 2
    io = 2 * 2 * c["tokens"] * c["width"] + pairs * (8 + 2)
    return {"forward, each row once": tables * touched * row + io, "forward, each row once per pair": tables * pairs * row + io,
            "forward, by expert": (tables - 1) * touched * row + pairs * row + io,
            "backward, each row once": 2 * tables * touched * row + 2 * io, "backward, rows once and input by token": (tables + 1) * touched * row + (tables - 1) * pairs * row + 2 * io}


def inputs(torch, c, device, dtype):
    "Tables, tokens, weights and row numbers"
    g = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device=device, dtype=dtype)
    tables = [draw(c["experts"], c["width"] * c["parts"]) for _ in range(1 if c.get("kind") == "pkm" else 2)]
    index = torch.randint(0, c["experts"], (c["tokens"], c["heads"] * c["top_k"]), generator=g, device=device)
    weights = torch.rand(index.shape, generator=g, device=device).to(dtype)
    return tables, draw(c["tokens"], c["width"]), weights, index, draw(c["tokens"], c["width"])


def variants(torch, c, compiled):
    "Each way of computing the expert part: (tables, x, weights, index) -> output"
    from peer_nb.models.kernels import ops
    from peer_nb.models.kernels.rows import run_experts_reference, sum_rows_reference
    from peer_nb.models.peer import ReadExperts, ReadValues
    if c.get("kind") == "pkm":
        found = {"fused": lambda t, x, w, i: ops.values(t[0], w, i, False), "fused, table gradient in factors": lambda t, x, w, i: ops.values(t[0], w, i, False, True),
                 "eager": lambda t, x, w, i: ReadValues.apply(t[0], w, i, False),
                 "embedding_bag": lambda t, x, w, i: torch.nn.functional.embedding_bag(i, t[0], per_sample_weights=w, mode="sum"),
                 "gathered": lambda t, x, w, i: sum_rows_reference(t[0], i, w)}
    else:
        found = {"fused": lambda t, x, w, i: ops.read_experts(*t, x, w, i, "gelu", by_row_from=float("inf")),
                 "fused, table gradients in factors": lambda t, x, w, i: ops.read_experts(*t, x, w, i, "gelu", by_row_from=float("inf"), factors=True),
                 "fused, by expert": lambda t, x, w, i: ops.read_experts(*t, x, w, i, "gelu", by_row_from=0.0),
                 "eager": lambda t, x, w, i: ReadExperts.apply(*t, x, w, i, "gelu", False),
                 "gathered": lambda t, x, w, i: run_experts_reference(*t, x, i, w, "gelu"),
                 "embedding_bag, output side only": lambda t, x, w, i: torch.nn.functional.embedding_bag(i, t[1], per_sample_weights=w, mode="sum")}
    if compiled: found["gathered, torch.compile"] = compile_for(torch, found["gathered"])
    return found


def compile_for(torch, f):
    "Compiled for the GPU; where there is none, traced only"
    return torch.compile(f, backend="inductor" if DEVICE == "cuda" else "aot_eager")


class Stopwatch:
    "Milliseconds of a call on the GPU, with a cold cache"
    def __init__(self, torch):
        self.torch, self.other = torch, torch.empty(512 << 20 if DEVICE == "cuda" else 1, dtype=torch.int8, device=DEVICE)

    def __call__(self, f):
        if DEVICE == "cpu": return self.of_the_processor(f)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.zero_()
        start.record()
        f()
        end.record()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end)

    def of_the_processor(self, f):
        start = perf_counter()
        f()
        return 1e3 * (perf_counter() - start)


def rounds(torch, calls, repeats):
    "Medians and samples of several calls, in turns; what runs out of memory says so"
    watch, samples, failed = Stopwatch(torch), {name: [] for name in calls}, {}
    for i in range(-3 if DEVICE == "cuda" else 0, repeats):
        for name, f in calls.items():
            if name in failed: continue
            try: taken = watch(f)
            except torch.OutOfMemoryError as e:
                failed[name] = f"out of memory: {str(e).splitlines()[0]}"
                forget(torch)
                continue
            if i >= 0: samples[name].append(round(taken, 4))
    return {name: dict(ms=median(s), samples=s) for name, s in samples.items() if s} | {name: dict(failed=why) for name, why in failed.items()}


def forget(torch):
    "Give unused memory back to the device"
    gc.collect()
    if DEVICE == "cuda": torch.cuda.empty_cache()


def peak(torch, f):
    "MiB above the start at the highest point of a call, and what it leaves behind"
    forget(torch)
    if DEVICE == "cpu":
        f()
        return dict(peak_mib=None, kept_mib=None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = f()
    torch.cuda.synchronize()
    found = dict(peak_mib=round((torch.cuda.max_memory_allocated() - before) / 2**20, 1), kept_mib=round((torch.cuda.memory_allocated() - before) / 2**20, 1))
    del kept
    return found


def agreement(torch, calls, reference):
    "Largest difference of each variant's output from float64, over the first tokens"
    want = reference()
    return {name: ((f()[:len(want)].double() - want).abs().max() / want.abs().max()).item() for name, f in calls.items() if "only" not in name}


def measure_shape(torch, c, repeats, compiled):
    "All variants at one shape"
    from peer_nb.models.kernels import ops
    from peer_nb.models.kernels.rows import run_experts_reference, sum_rows_reference
    tables, x, w, index, grad = inputs(torch, c, DEVICE, torch.bfloat16)
    leaves = [t.requires_grad_() for t in (*tables, x, w)]
    ways = variants(torch, c, compiled)
    if c["tokens"] * index.shape[1] * c["width"] * 2 > 30e9: ways = {n: f for n, f in ways.items() if "gathered" not in n}
    bind = lambda f: lambda: f(tables, x, w, index)
    few = slice(0, 64)
    with torch.no_grad():
        twin = sum_rows_reference if c.get("kind") == "pkm" else run_experts_reference
        def reference():
            rows, where = index[few].unique(return_inverse=True)
            small = [t[rows].double() for t in tables]
            args = (small[0], where, w[few].double()) if c.get("kind") == "pkm" else (*small, x[few].double(), where, w[few].double(), "gelu")
            return twin(*args)
        agree = agreement(torch, {n: bind(f) for n, f in ways.items()}, reference)
        forward = rounds(torch, {n: bind(f) for n, f in ways.items()}, repeats)

    def both(f):
        def run():
            with ops.collect_factors(lambda table, factors: None):
                out = f(tables, x, w, index)
                out.backward(grad)
            for leaf in leaves: leaf.grad = None
        return run

    total = rounds(torch, {n: both(f) for n, f in ways.items()}, repeats)
    memory = {n: dict(forward=peak(torch, bind(f)), both=peak(torch, both(f))) for n, f in ways.items() if "ms" in total[n]}
    touched = len(index.unique())
    bytes_ = floors(c, touched)
    for name, found in forward.items():
        if "ms" in found: found["gb_per_s"] = round(bytes_["forward, each row once per pair"] / found["ms"] / 1e6, 1)
    return dict(shape=c, rows_touched=touched, floor_bytes=bytes_, difference_from_float64=agree, forward=forward, forward_and_backward=total, memory=memory)


def measure_retrieval(torch, repeats):
    "Queries of the headline shape: fused, eager, eager under torch.compile"
    from peer_nb.models.kernels import ops
    from peer_nb.models.product_keys import product_top_k
    c = HEADLINE if DEVICE == "cuda" else TINY
    T, H, k, sizes, width = c["tokens"], c["heads"], c["top_k"], [int(c["experts"]**.5)] * 2, 128
    query = torch.randn(T, H, 2 * width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    keys = (torch.randn(H, sum(sizes), width, device=DEVICE) / width**.5).bfloat16().requires_grad_()

    def eager():
        parts = [torch.einsum("thc,hnc->thn", q, s) for q, s in zip(query.chunk(2, -1), keys.split(sizes, 1))]
        return product_top_k(parts, k)

    ways = {"fused": lambda: ops.retrieve(query, keys, sizes, k), "eager": eager, "eager, torch.compile": compile_for(torch, eager)}
    with torch.no_grad(): forward = rounds(torch, ways, repeats)
    g = torch.randn(T, H, k, device=DEVICE)
    both = rounds(torch, {n: (lambda f=f: torch.autograd.grad(f()[0], (query, keys), g.to(f()[0].dtype))) for n, f in ways.items() if n == "fused"}, repeats)
    return dict(forward=forward, forward_twice_and_backward=both)


def measure_update(torch, repeats):
    "One table of the headline shape: from factors (sorted pairs, length, update), from a dense gradient by the kernel and by the training loop's torch operations"
    from peer_nb.models.kernels import updates
    from peer_nb.training.table_optim import adamw_8bit, adamw_factors, code_values, moment_state
    c, group = HEADLINE if DEVICE == "cuda" else TINY | dict(width=256), dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        (table, _), x, numbers, index, _ = inputs(torch, c, DEVICE, dtype)
        state, numbers = moment_state(table), numbers.float()
        codes = [code_values(signed, table.device) for signed in (True, False)]
        moments = updates.Moments(*(state[k] for k in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")), *codes)
        factors = updates.factored(index, numbers, x, len(table))
        grad, one = torch.randn_like(table), torch.ones((), device=DEVICE)
        ways = {"sort the pairs": lambda: updates.factored(index, numbers, x, len(table)), "length of the factored gradient": lambda: updates.gradient_norm(factors, table),
                "update from factors": lambda: adamw_factors(table, factors, state, group),
                "update from a gradient, kernel": lambda: updates.adamw_(table, grad, moments, one, 2, 0, *group.values()),
                "update from a gradient, eager": lambda: adamw_8bit(table, grad, state, group)}
        results[str(dtype).removeprefix("torch.")] = dict(rounds(torch, ways, repeats), memory={n: peak(torch, f) for n, f in ways.items()})
        del table, grad, state, moments
    return results


def measure_step(torch, steps, compiled):
    "Whole training steps of configs/one_h200.yaml on random tokens: milliseconds, tokens a second, the most memory"
    from peer_nb.config import apply_overrides, load_config, to_dict
    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    from peer_nb.training.steps import accumulate_gradient
    from peer_nb.training.optim import build_optimizer, clip_gradients, consuming_tables
    cfg = load_config(ROOT/"configs"/"one_h200.yaml")
    if DEVICE == "cpu": cfg = apply_overrides(cfg, TINY_MODEL)
    train, shape = cfg.train_config, (cfg.train_config.per_device_train_batch_size, cfg.dataset_config.max_seq_length)
    if DEVICE == "cuda": torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with torch.device(DEVICE): model = PeerMLAForCausalLM(PeerMLAConfig(**to_dict(cfg)["model_config"])).train()
    if train.gradient_checkpointing: model.gradient_checkpointing_enable()
    forward = compile_for(torch, model) if compiled else model
    optimizer = build_optimizer(model, train, cfg.model_config.peer_config.table_gradient)
    watch, samples, norms = Stopwatch(torch), [], []

    def step():
        ids = torch.randint(0, cfg.model_config.vocab_size, shape, device=DEVICE)
        with consuming_tables(optimizer, train): accumulate_gradient(forward, [dict(input_ids=ids, labels=ids)], ids.numel() - len(ids), train)
        norms.append(clip_gradients(optimizer, train).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    try:
        for i in range(-2 if DEVICE == "cuda" else 0, steps): samples += [watch(step)] if i >= 0 else [watch(step)][:0]
    except torch.OutOfMemoryError as e: return dict(failed=f"out of memory: {str(e).splitlines()[0]}")
    memory = dict(peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1), reserved_gib=round(torch.cuda.max_memory_reserved() / 2**30, 1)) if DEVICE == "cuda" else {}
    return dict(parameters=sum(p.numel() for p in model.parameters()), tokens=shape[0] * shape[1], compiled=compiled, ms=median(samples), samples=[round(t, 2) for t in samples],
                tokens_per_second=round(1e3 * shape[0] * shape[1] / median(samples)), norms=norms, **memory)


def measure_peer_pytorch(torch, repeats):
    "The public implementation beside our layer, with its router, at the headline shape in bfloat16"
    try: version = importlib.metadata.version("PEER-pytorch")
    except importlib.metadata.PackageNotFoundError: return dict(left_out=f"PEER-pytorch is not installed (pip install PEER-pytorch=={PEER_VERSION})")
    if version != PEER_VERSION: return dict(left_out=f"PEER-pytorch {version} is installed; the comparison is with {PEER_VERSION}")
    from PEER_pytorch import PEER as Theirs
    from peer_nb.models.peer import PEER
    c = HEADLINE if DEVICE == "cuda" else TINY
    side = int(c["experts"]**.5)
    with torch.device(DEVICE):
        theirs = Theirs(c["width"], heads=c["heads"], num_experts=side**2, num_experts_per_head=c["top_k"], dim_key=128, non_competing_scores=False).bfloat16()
        ours = PEER(c["width"], num_experts=side**2, num_experts_per_tok=c["top_k"], num_heads=c["heads"], product_key_dim=[side, side], query_dim=256, query_norm="none").bfloat16()
    results = {}
    for tokens in (c["tokens"] // 16, c["tokens"] // 4, c["tokens"]) if DEVICE == "cuda" else [c["tokens"]]:
        x = torch.randn(1, tokens, c["width"], device=DEVICE, dtype=torch.bfloat16)
        def step(layer):
            def run():
                layer(x).sum().backward()
                for p in layer.parameters(): p.grad = None
            return run
        results[tokens] = rounds(torch, {"ours": step(ours), "PEER-pytorch": step(theirs)}, repeats)
    return dict(version=version, forward_and_backward=results)


def copy_speed(torch):
    "GB/s of a copy, read and write counted"
    a, b = (torch.empty(4 << 30 if DEVICE == "cuda" else 1 << 20, dtype=torch.int8, device=DEVICE) for _ in range(2))
    taken = rounds(torch, {"copy": lambda: b.copy_(a)}, 20)["copy"]["ms"]
    return float(f"{2 * a.numel() / taken / 1e6:.3g}")


def check():
    "Every variant at tiny shapes against float64, in Triton's interpreter"
    os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from peer_nb.models.kernels import ops
    from peer_nb.models.kernels.rows import run_experts_reference, sum_rows_reference
    from peer_nb.models.product_keys import brute_force_top_k
    found = {}
    for kind in ("peer", "pkm"):
        c = dict(width=24, experts=16, heads=1, top_k=3, tokens=4, parts=1, kind=kind)
        tables, x, w, index, grad = inputs(torch, c, "cpu", torch.float32)
        leaves = [t.requires_grad_() for t in ([*tables, x, w] if kind == "peer" else [*tables, w])]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        want = run_experts_reference(*wide[:3], index, wide[3], "gelu") if kind == "peer" else sum_rows_reference(wide[0], index, wide[1])
        expected = [want.detach(), *torch.autograd.grad(want, wide, grad.double())]
        for name, f in variants(torch, c, False).items():
            if "only" in name or "factors" in name: continue
            out = f(tables, x, w, index)
            got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
            found[f"{kind}: {name}"] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected))
    query, keys = torch.randn(3, 2, 12), torch.randn(2, 17, 6)
    each = [torch.einsum("thc,hnc->thn", q, s) for q, s in zip(query.double().chunk(2, -1), keys.double().split([8, 9], 1))]
    scores, index = ops.retrieve(query, keys, [8, 9], 4)
    best, rows = brute_force_top_k(each, 4)
    found["retrieval: fused"] = ((scores - best).abs().max() / best.abs().max()).item() if torch.equal(index, rows) else float("inf")
    for name, value in found.items(): print(f"{name:40} {value:.1e}")
    if max(found.values()) > 1e-4: sys.exit("a variant differs from float64")
    print("all agree with float64; nothing was timed")


def compile_all(capability):
    "Registers and spills of every kernel at the headline shape, from Triton's compiler and ptxas; needs no GPU"
    os.environ["TRITON_INTERPRET"] = "0"
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from peer_nb.models.kernels import retrieval, rows, updates
    wide = rows.blocks(HEADLINE["width"], HEADLINE["heads"] * HEADLINE["top_k"])
    few = wide | dict(ROWS=min(4, wide["ROWS"]))
    experts = dict(KIND="gelu", PARTS=1)
    table = dict(PARTS=1, COLUMNS=updates.SHARED, WHOLE=True)
    narrow, adamw = table | dict(PARTS=2, WHOLE=False), table | dict(FACTORS=True, ROUND=True, EIGHT=True, num_warps=2)
    kernels = [("sum_rows", rows.sum_rows_kernel, dict(PARTS=1) | wide), ("experts", rows.experts_kernel, experts | wide),
               ("by_row, experts", rows.by_row_kernel, experts | dict(EXPERTS=True, SUMS=True, DOTS=True) | few),
               ("by_row, values", rows.by_row_kernel, experts | dict(EXPERTS=False, SUMS=True, DOTS=True) | few),
               ("by_row, sums", rows.by_row_kernel, experts | dict(EXPERTS=False, SUMS=True, DOTS=False) | few),
               ("join_pieces", rows.join_pieces_kernel, dict(WIDTH=1024)), ("dot_rows", rows.dot_rows_kernel, dict(PARTS=1) | wide),
               ("dot_by_row", rows.dot_by_row_kernel, dict(PARTS=1) | few), ("pair_numbers", rows.pair_numbers_kernel, experts | dict(BLOCK=1024)),
               ("by_row, no sums", rows.by_row_kernel, experts | dict(EXPERTS=True, SUMS=False, DOTS=True) | few),
               ("pieces", updates.pieces_kernel, table), ("pieces, any width", updates.pieces_kernel, narrow),
               ("squares", updates.squares_kernel, table), ("squares, any width", updates.squares_kernel, narrow),
               ("adamw, factors", updates.adamw_kernel, adamw), ("adamw, any width", updates.adamw_kernel, adamw | narrow),
               ("adamw, float32 table", updates.adamw_kernel, adamw | dict(ROUND=False)),
               ("adamw, gradient", updates.adamw_kernel, adamw | dict(FACTORS=False)),
               ("adamw, float32 moments", updates.adamw_kernel, adamw | narrow | dict(EIGHT=False, ROUND=False)),
               ("retrieve", retrieval.retrieve_kernel, dict(SIZES=(1024, 1024), K=16, CANDIDATES=64, TOKENS=16, COLUMNS=64, CHUNK=32, WIDEN=False))]
    ptxas = Path(triton.__file__).parent/"backends"/"nvidia"/"bin"/"ptxas"
    results = {}
    for name, kernel, constants in kernels:
        constants = dict(constants)
        warps = constants.pop("num_warps", 4)
        plain = dict(table="*fp32") if constants.get("ROUND") is False else {}
        moments = dict.fromkeys(("first", "second"), "*u8" if constants.get("EIGHT") else "*fp32") if "EIGHT" in constants else {}
        kind = lambda arg: "constexpr" if arg in constants else KERNELS_AT.get(arg) or plain.get(arg) or moments.get(arg) or POINTERS.get(arg, "*bf16")
        source = ASTSource(kernel, signature={arg: kind(arg) for arg in kernel.arg_names}, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)/"kernel.ptx"
            path.write_text(made.asm["ptx"])
            said = subprocess.run([ptxas, "-v", f"-arch=sm_{capability}a", path, "-o", "/dev/null"], capture_output=True, text=True).stderr
        numbers = [int(re.search(pattern, said)[1]) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
        results[name] = dict(registers=numbers[0], spilled_bytes=numbers[1], shared_bytes=made.metadata.shared, warps=warps)
        print(f"{name:20} {numbers[0]:4} registers {numbers[1]:5} bytes spilled {made.metadata.shared:6} bytes shared {warps:3} warps", flush=True)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="+", help="parts of the measurement; all by default")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave the variants under torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the results go")
    parser.add_argument("--check", action="store_true", help="correctness at tiny shapes in Triton's interpreter; no GPU needed, nothing timed")
    parser.add_argument("--compile", action="store_true", help="compile every kernel for sm_90 and print registers and spills; no GPU needed, nothing timed")
    parser.add_argument("--tiny", action="store_true", help="run every branch of the measurement once at tiny sizes, in Triton's interpreter; no GPU needed, nothing is kept")
    args = parser.parse_args()
    if args.check: return check()
    if args.compile: return compile_all(90)
    if args.tiny: return tiny(args)
    import torch
    if not torch.cuda.is_available():
        print("peer_gpu.py: error: no CUDA device is visible to torch. --check, --compile and --tiny need none.", file=sys.stderr)
        sys.exit(2)
    measure(torch, args, lambda result: args.out.write_text(json.dumps(result, indent=1) + "\n"))    # after each part, so that a lost machine loses little


def measure(torch, args, save):
    "All parts, one after the other"
    parts, at = args.only or PARTS, (HEADLINE, SWEEP) if DEVICE == "cuda" else (TINY, TINY_SWEEP)
    result = dict(schema=2, machine=machine(torch), clock="CUDA events, cold cache, medians of variants in turns", dtype="bfloat16", repeats=args.repeats,
                  copy_gb_per_s=copy_speed(torch), shapes=[])
    for c in ([at[0]] if "headline" in parts else []) + (at[1] if "sweep" in parts else []):
        result["shapes"].append(measure_shape(torch, c, args.repeats, not args.no_compile))
        save(result)
        forget(torch)
    rest = {"retrieval": lambda: measure_retrieval(torch, args.repeats), "update": lambda: measure_update(torch, args.repeats),
            "peer-pytorch": lambda: measure_peer_pytorch(torch, args.repeats),
            "step": lambda: [measure_step(torch, args.repeats, compiled) for compiled in ([False] if args.no_compile else [False, True])]}
    for name in parts:
        if name not in rest: continue
        result[name] = rest[name]()
        save(result)
        forget(torch)
    return result


def tiny(args):
    "Every branch at tiny sizes on the processor"
    global DEVICE
    os.environ["TRITON_INTERPRET"], DEVICE, args.repeats = "1", "cpu", 1
    import torch
    result = measure(torch, args, lambda result: json.dumps(result))
    failed = [f"{part}: {name}: {found['failed']}" for part, ways in walk(result) for name, found in ways.items() if "failed" in found]
    for part, ways in walk(result): print(f"{part}: {', '.join(ways)}")
    if failed: sys.exit("\n".join(failed))
    print("every branch ran; times of the interpreter mean nothing and were not kept")


def walk(result):
    "Parts of a result, with what ran in each of them"
    for found in result["shapes"]: yield from ((f"{found['shape'].get('kind', 'peer')} {name}", found[name]) for name in ("forward", "forward_and_backward"))
    yield from ((f"retrieval {name}", ways) for name, ways in result.get("retrieval", {}).items())
    yield from ((f"update {name}", {n: f for n, f in ways.items() if n != "memory"}) for name, ways in result.get("update", {}).items())
    yield "step", {f"compiled {found.get('compiled')}": found for found in result.get("step", [])}
    yield from ((f"PEER-pytorch {n} tokens", ways) for n, ways in result.get("peer-pytorch", {}).get("forward_and_backward", {}).items())


if __name__ == "__main__": main()
