"""PEER on one CPU thread: this package's layer beside PEER-pytorch, equal weights, in turns.

    pip install PEER-pytorch==0.2.2
    python benchmarks/peer_cpu.py            # some five minutes; writes benchmarks/peer_cpu.json

Times are process CPU time. Each variant's memory is measured in a process of its own: the highest resident set
during a forward and a backward pass, less what was resident before."""
import argparse
import copy
import gc
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

WIDTH, TOKENS, HEADS, TOP_K = 256, 512, 8, 16
SIDES = {"65k": 256, "1M": 1024}    # experts are the square
VARIANTS = ("PEER-pytorch", "dense", "sparse")
PEER_VERSION = "0.2.2"
WARM_UP = 3    # rounds that are not counted; the first to touch memory pay for it


def ours(side, gradient):
    from peer_nb.models.peer import PEER
    return PEER(WIDTH, num_experts=side**2, num_experts_per_tok=TOP_K, num_heads=HEADS, product_key_dim=[side, side], query_dim=WIDTH,
                query_norm="none", table_gradient=gradient)


def theirs(side):
    from PEER_pytorch import PEER
    return PEER(WIDTH, heads=HEADS, num_experts=side**2, num_experts_per_head=TOP_K, dim_key=WIDTH//2, non_competing_scores=False)


@torch.no_grad()
def copy_router(source, target):
    "Their query projection lists dimension, head, channel; ours head, dimension, channel"
    weight = source.to_queries[0].weight.view(2, HEADS, WIDTH//2, WIDTH)
    target.query_proj.weight.copy_(weight.transpose(0, 1).reshape(-1, WIDTH))
    target.keys.copy_(source.keys.permute(0, 2, 1, 3).flatten(1, 2))


@torch.no_grad()
def copy_tables(source, target):
    "Row by row the same numbers"
    target.expert_down.weight.copy_(source.weight_down_embed.weight)
    target.expert_up.weight.copy_(source.weight_up_embed.weight)


def clear(layer):
    for p in layer.parameters(): p.grad = None


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(peer, layer, x, g):
    "Largest differences of output and gradients, relative to the largest number"
    results = []
    for m in (peer, layer):
        clear(m)
        leaf = x.clone().requires_grad_()
        out = m(leaf)
        out.backward(g)
        tables = [p.grad for n, p in m.named_parameters() if "embed" in n or "expert" in n]
        keys = m.keys.grad.permute(0, 2, 1, 3).flatten(1, 2) if m is peer else m.keys.grad
        results.append([out.detach(), leaf.grad, keys, *tables])
        clear(m)
    names = ("output", "input gradient", "key gradient", "input table gradient", "output table gradient")
    found = {}
    for name, want, got in zip(names, *results):
        rows = slice(None)
        if got.is_sparse:
            rows, got = got._indices()[0], got._values()
            rest = torch.ones(len(want), dtype=torch.bool)
            rest[rows] = False
            assert not want[rest].any(), "a row that was not read has a gradient"
        found[name] = difference(got, want[rows])
    return found


def timed(f):
    "Milliseconds of the process, and the part of them that the system took, mostly to clear fresh memory"
    start = resource.getrusage(resource.RUSAGE_SELF)
    f()
    end = resource.getrusage(resource.RUSAGE_SELF)
    user, system = end.ru_utime - start.ru_utime, end.ru_stime - start.ru_stime
    return 1e3 * (user + system), 1e3 * system


def speed(side, repeats):
    "Milliseconds of each variant, taken in turns"
    torch.manual_seed(0)
    peer = theirs(side)
    x, g = torch.randn(1, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    layers = {"PEER-pytorch": peer, "dense": ours(side, "dense")}
    copy_tables(peer, layers["dense"])
    copy_router(peer, layers["dense"])
    layers["sparse"] = copy.copy(layers["dense"])    # the same parameters
    layers["sparse"].table_gradient = "sparse"
    agreement = {name: compare(peer, layers[name], x, g) for name in VARIANTS[1:]}
    for name, found in agreement.items():
        assert max(found.values()) < 1e-4, f"{name} differs from PEER-pytorch: {found}"
    samples = {"forward": {name: [] for name in ("PEER-pytorch", "ours")}, "forward + backward": {name: [] for name in VARIANTS}}
    for i in range(-WARM_UP, repeats):
        for name, variant in (("PEER-pytorch", "PEER-pytorch"), ("ours", "sparse")):
            measure(samples["forward"][name], lambda: layers[variant](x), i >= 0)
        for name in VARIANTS:
            measure(samples["forward + backward"][name], lambda: (layers[name](x).backward(g), clear(layers[name])), i >= 0)
    return {"experts": side**2, "difference": agreement} | {what: table(found) for what, found in samples.items()}


def measure(samples, f, counts):
    "Once untimed, so that the memory that it takes and frees is at hand, as in the middle of a training run, then timed"
    f()
    taken = timed(f)
    if counts: samples.append(taken)


def table(samples):
    "Medians and speed-up of each variant, with all samples"
    base = median(ms for ms, _ in samples["PEER-pytorch"])
    return {name: {"ms": round(median(ms for ms, _ in taken), 2), "of which system": round(median(s for _, s in taken), 2),
        "speedup": round(base / median(ms for ms, _ in taken), 2), "samples": [round(ms, 2) for ms, _ in taken]} for name, taken in samples.items()}


def resident(field):
    with open("/proc/self/status") as f: return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def memory(side, variant):
    "Bytes above the start at the highest point of one forward and backward pass; run in a process of its own"
    torch.manual_seed(0)
    layer = theirs(side)
    if variant != "PEER-pytorch":
        peer, layer = layer, ours(side, variant)
        copy_router(peer, layer)
        copy_tables(peer, layer)
        del peer
    x, g = torch.randn(1, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    layer(x[:, :2]).backward(g[:, :2])    # libraries make their own buffers at the first call
    clear(layer)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")    # the highest mark starts anew
    layer(x).backward(g)
    return resident("VmHWM") - before


def usage_cost(steps):
    "A training step of a small model with and without expert statistics, in turns"
    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    torch.manual_seed(0)
    peer = dict(num_experts=128**2, product_key_dim=[128, 128], num_heads=4, num_experts_per_tok=8, query_dim=64, query_norm="batch")
    mla = dict(q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
    model = PeerMLAForCausalLM(PeerMLAConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=352, vocab_size=2048,
        max_position_embeddings=128, tie_word_embeddings=True, peer_start_layer=0, peer_config=peer, mla_config=mla)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 2048, (4, 128))
    layers = [m.memory for m in model.model.layers]
    usages = [layer.collect_usage() for layer in layers]

    def step():
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    samples = {"off": [], "on": []}
    for i in range(steps + 3):
        for name in ("off", "on") if i % 2 else ("on", "off"):
            for layer, usage in zip(layers, usages): layer.usage = usage if name == "on" else None
            ms, _ = timed(step)
            if i > 2: samples[name].append(ms)
    off = median(samples["off"])
    extra = median(b - a for a, b in zip(samples["off"], samples["on"]))
    return {"model": "hidden 128, 3 memory layers of 128 x 128 experts, 4 heads x 8, 512 tokens, AdamW", "ms off": round(off, 2),
        "ms on": round(median(samples["on"]), 2), "percent of a step": round(100 * extra / off, 2),
        "samples": {name: [round(v, 2) for v in ms] for name, ms in samples.items()}}


def machine():
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    large = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {"cpu": model, "cores": os.cpu_count(), "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(), "transparent huge pages": large.read_text().strip() if large.exists() else "unknown",
        "load before (1, 5, 15 minutes)": [round(v, 2) for v in os.getloadavg()]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIDES, default=list(SIDES), help="numbers of experts")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds per size")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the results go")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of: return print(memory(SIDES["65k"], args.memory_of))
    version = importlib.metadata.version("PEER-pytorch")
    if version != PEER_VERSION: sys.exit(f"PEER-pytorch {version} is installed; the comparison is with {PEER_VERSION}: pip install PEER-pytorch=={PEER_VERSION}")
    result = {"machine": machine(), "torch": torch.__version__, "PEER-pytorch": version, "threads": torch.get_num_threads(), "clock": "process CPU time",
        "layer": f"width {WIDTH}, {TOKENS} tokens, {HEADS} heads x {TOP_K}, query width {WIDTH} per head, float32", "repeats": args.repeats, "sizes": {}}
    for size in args.sizes:
        result["sizes"][size] = speed(SIDES[size], args.repeats)
        gc.collect()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    taken = {}
    for name in VARIANTS:
        runs = [int(subprocess.run([sys.executable, __file__, "--memory-of", name], env=environment, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        taken[name] = {"MiB": round(median(runs) / 2**20, 1), "samples": [round(v / 2**20, 1) for v in runs]}
    for found in taken.values(): found["part of PEER-pytorch's"] = round(found["MiB"] / taken["PEER-pytorch"]["MiB"], 3)
    result["extra peak memory, forward + backward, 65k"] = taken
    result["expert statistics"] = usage_cost(40)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
