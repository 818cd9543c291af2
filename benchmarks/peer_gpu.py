"""PEER and product-key memory on one GPU: the fused kernels beside the eager layer, torch.compile and PEER-pytorch.

    pip install PEER-pytorch==0.2.2                 # the comparison with it is left out, and said so, where it is missing
    python benchmarks/peer_gpu.py                   # on a GPU; writes benchmarks/peer_gpu.json
    python benchmarks/peer_gpu.py --only headline   # the shape of the floors; a few minutes
    python benchmarks/peer_gpu.py --check           # without a GPU: every kernel against float64 at tiny shapes, in Triton's interpreter
    python benchmarks/peer_gpu.py --compile         # without a GPU: every kernel compiled for sm_90, its registers and spills

Index and scores are given to the expert part; retrieval is timed apart. Times are medians of CUDA events, variants in turns.
Before each timed call a large buffer is overwritten, so that no table row is found in the cache. Bytes are those that a
pass must move at least; bytes over time are set against a copy of 4 GiB that the same run times."""
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

PEER_VERSION = "0.2.2"
HEADLINE = dict(width=768, experts=1024**2, heads=8, top_k=16, tokens=32768, parts=1)
SWEEP = [HEADLINE | change for change in (
    [dict(experts=side**2) for side in (128, 256, 512, 2048)] + [dict(tokens=n) for n in (1024, 8192, 65536)]
    + [dict(width=w, experts=512**2) for w in (256, 1536, 4096)] + [dict(heads=4, top_k=32, kind="pkm")])]
KERNELS_AT = dict(P="i32", D="i32", T="i32", H="i32", C="i32", SET_STRIDE="i32", k="i32", WIDTH_ALL="i32", total="i32", seed="i32",
                  **dict.fromkeys(("lr", "beta1", "beta2", "eps", "decay", "correct1", "correct2"), "fp32"))
POINTERS = dict.fromkeys(("index", "order", "rows", "begin", "end", "piece_row", "piece_count", "piece_first", "out_rows"), "*i64")
POINTERS |= dict.fromkeys(("pre", "grad_pre", "grad_weights", "products", "pieces", "numbers", "sums", "scale1", "scale2", "signed", "unsigned", "factor",
                           "out_scores"), "*fp32") | dict(codes1="*u8", codes2="*u8", ranks="*i32")


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
        found = {"fused": lambda t, x, w, i: ops.values(t[0], w, i, False), "eager": lambda t, x, w, i: ReadValues.apply(t[0], w, i, False),
                 "embedding_bag": lambda t, x, w, i: torch.nn.functional.embedding_bag(i, t[0], per_sample_weights=w, mode="sum"),
                 "gathered": lambda t, x, w, i: sum_rows_reference(t[0], i, w)}
    else:
        found = {"fused": lambda t, x, w, i: ops.read_experts(*t, x, w, i, "gelu", by_row_from=float("inf")),
                 "fused, by expert": lambda t, x, w, i: ops.read_experts(*t, x, w, i, "gelu", by_row_from=0.0),
                 "eager": lambda t, x, w, i: ReadExperts.apply(*t, x, w, i, "gelu", False),
                 "gathered": lambda t, x, w, i: run_experts_reference(*t, x, i, w, "gelu"),
                 "embedding_bag, output side only": lambda t, x, w, i: torch.nn.functional.embedding_bag(i, t[1], per_sample_weights=w, mode="sum")}
    if compiled: found["gathered, torch.compile"] = torch.compile(found["gathered"])
    return found


class Stopwatch:
    "Milliseconds of a call on the GPU, with a cold cache"
    def __init__(self, torch):
        self.torch, self.other = torch, torch.empty(512 << 20, dtype=torch.int8, device="cuda")

    def __call__(self, f):
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.zero_()
        start.record()
        f()
        end.record()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end)


def rounds(torch, calls, repeats):
    "Medians and samples of several calls, in turns; what runs out of memory says so"
    watch, samples, failed = Stopwatch(torch), {name: [] for name in calls}, {}
    for i in range(-3, repeats):
        for name, f in calls.items():
            if name in failed: continue
            try: taken = watch(f)
            except torch.OutOfMemoryError as e:
                failed[name] = f"out of memory: {str(e).splitlines()[0]}"
                torch.cuda.empty_cache()
                continue
            if i >= 0: samples[name].append(round(taken, 4))
    return {name: dict(ms=median(s), samples=s) for name, s in samples.items() if s} | {name: dict(failed=why) for name, why in failed.items()}


def peak(torch, f):
    "GiB above the start at the highest point of a call, and what it leaves behind"
    gc.collect()
    torch.cuda.empty_cache()
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
    from peer_nb.models.kernels.rows import run_experts_reference, sum_rows_reference
    tables, x, w, index, grad = inputs(torch, c, "cuda", torch.bfloat16)
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
    T, H, k, sizes, width = HEADLINE["tokens"], HEADLINE["heads"], HEADLINE["top_k"], [1024, 1024], 128
    query = torch.randn(T, H, 2 * width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    keys = (torch.randn(H, sum(sizes), width, device="cuda") / width**.5).bfloat16().requires_grad_()

    def eager():
        parts = [torch.einsum("thc,hnc->thn", q, s) for q, s in zip(query.chunk(2, -1), keys.split(sizes, 1))]
        return product_top_k(parts, k)

    ways = {"fused": lambda: ops.retrieve(query, keys, sizes, k), "eager": eager, "eager, torch.compile": torch.compile(eager)}
    with torch.no_grad(): forward = rounds(torch, ways, repeats)
    g = torch.randn(T, H, k, device="cuda")
    both = rounds(torch, {n: (lambda f=f: torch.autograd.grad(f()[0], (query, keys), g.to(f()[0].dtype))) for n, f in ways.items() if n == "fused"}, repeats)
    return dict(forward=forward, forward_twice_and_backward=both)


def measure_peer_pytorch(torch, repeats):
    "The public implementation beside our layer, with its router, at the headline shape in bfloat16"
    try: version = importlib.metadata.version("PEER-pytorch")
    except importlib.metadata.PackageNotFoundError: return dict(left_out=f"PEER-pytorch is not installed (pip install PEER-pytorch=={PEER_VERSION})")
    if version != PEER_VERSION: return dict(left_out=f"PEER-pytorch {version} is installed; the comparison is with {PEER_VERSION}")
    from PEER_pytorch import PEER as Theirs
    from peer_nb.models.peer import PEER
    c, side = HEADLINE, 1024
    with torch.device("cuda"):
        theirs = Theirs(c["width"], heads=c["heads"], num_experts=side**2, num_experts_per_head=c["top_k"], dim_key=128, non_competing_scores=False).bfloat16()
        ours = PEER(c["width"], num_experts=side**2, num_experts_per_tok=c["top_k"], num_heads=c["heads"], product_key_dim=[side, side], query_dim=256, query_norm="none").bfloat16()
    results = {}
    for tokens in (2048, 8192, c["tokens"]):
        x = torch.randn(1, tokens, c["width"], device="cuda", dtype=torch.bfloat16)
        def step(layer):
            def run():
                layer(x).sum().backward()
                for p in layer.parameters(): p.grad = None
            return run
        results[tokens] = rounds(torch, {"ours": step(ours), "PEER-pytorch": step(theirs)}, repeats)
    return dict(version=version, forward_and_backward=results)


def copy_speed(torch):
    "GB/s of a copy, read and write counted"
    a, b = (torch.empty(4 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    taken = rounds(torch, {"copy": lambda: b.copy_(a)}, 20)["copy"]["ms"]
    return round(2 * a.numel() / taken / 1e6, 1)


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
            if "only" in name: continue
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
    table = dict(PARTS=1, COLUMNS=updates.SHARED)
    kernels = [("sum_rows", rows.sum_rows_kernel, dict(PARTS=1) | wide), ("experts", rows.experts_kernel, experts | wide),
               ("by_row, experts", rows.by_row_kernel, experts | dict(EXPERTS=True, SUMS=True, DOTS=True) | few),
               ("by_row, values", rows.by_row_kernel, experts | dict(EXPERTS=False, SUMS=True, DOTS=True) | few),
               ("by_row, sums", rows.by_row_kernel, experts | dict(EXPERTS=False, SUMS=True, DOTS=False) | few),
               ("join_pieces", rows.join_pieces_kernel, dict(WIDTH=1024)), ("dot_rows", rows.dot_rows_kernel, dict(PARTS=1) | wide),
               ("dot_by_row", rows.dot_by_row_kernel, dict(PARTS=1) | few), ("pair_numbers", rows.pair_numbers_kernel, experts | dict(BLOCK=1024)),
               ("pieces", updates.pieces_kernel, table), ("squares", updates.squares_kernel, table),
               ("adamw, factors", updates.adamw_kernel, table | dict(FACTORS=True, ROUND=True, num_warps=2)),
               ("adamw, gradient", updates.adamw_kernel, table | dict(FACTORS=False, ROUND=True, num_warps=2)),
               ("retrieve", retrieval.retrieve_kernel, dict(SIZES=(1024, 1024), K=16, CANDIDATES=64, TOKENS=16, COLUMNS=64, CHUNK=32, WIDEN=False))]
    ptxas = Path(triton.__file__).parent/"backends"/"nvidia"/"bin"/"ptxas"
    results = {}
    for name, kernel, constants in kernels:
        constants = dict(constants)
        warps = constants.pop("num_warps", 4)
        kind = lambda arg: "constexpr" if arg in constants else KERNELS_AT.get(arg) or POINTERS.get(arg, "*bf16")
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
    parser.add_argument("--only", choices=["headline", "sweep", "retrieval", "peer-pytorch"], nargs="+", help="parts of the measurement; all by default")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave the variants under torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the results go")
    parser.add_argument("--check", action="store_true", help="correctness at tiny shapes in Triton's interpreter; no GPU needed, nothing timed")
    parser.add_argument("--compile", action="store_true", help="compile every kernel for sm_90 and print registers and spills; no GPU needed, nothing timed")
    args = parser.parse_args()
    if args.check: return check()
    if args.compile: return compile_all(90)
    import torch
    if not torch.cuda.is_available():
        print("peer_gpu.py: error: no CUDA device is visible to torch. --check and --compile need none.", file=sys.stderr)
        sys.exit(2)
    parts = args.only or ["headline", "sweep", "retrieval", "peer-pytorch"]
    result = dict(schema=1, machine=machine(torch), clock="CUDA events, cold cache, medians of variants in turns", dtype="bfloat16", repeats=args.repeats,
                  copy_gb_per_s=copy_speed(torch))
    shapes = ([HEADLINE] if "headline" in parts else []) + (SWEEP if "sweep" in parts else [])
    result["shapes"] = []

    def save(): args.out.write_text(json.dumps(result, indent=1) + "\n")    # after each part, so that a lost machine loses little

    for c in shapes:
        result["shapes"].append(measure_shape(torch, c, args.repeats, not args.no_compile))
        save()
        torch.cuda.empty_cache()
    if "retrieval" in parts: result["retrieval"] = measure_retrieval(torch, args.repeats)
    save()
    torch.cuda.empty_cache()
    if "peer-pytorch" in parts: result["PEER-pytorch"] = measure_peer_pytorch(torch, args.repeats)
    save()


if __name__ == "__main__": main()
