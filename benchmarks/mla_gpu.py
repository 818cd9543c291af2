"""One decoding step of latent attention on a GPU: ours against transformers' DeepSeek-V3, and the floor of reading the cache once.

    python benchmarks/mla_gpu.py            # on a GPU; writes benchmarks/mla_gpu.json
    python benchmarks/mla_gpu.py --check    # without a GPU: both layers agree at tiny shapes; nothing timed
    python benchmarks/mla_gpu.py --tiny     # without a GPU: the whole measurement at tiny shapes; nothing is kept

The two layers have equal weights, get the same tokens and the same cache of latents, and must give the same output.
The floor is the time in which the GPU's own copy speed reads every layer's latent and rotary key once, 1,152 bytes a token
in bfloat16. DeepSeek-V3 in transformers rebuilds the keys and values of all heads from the latents in every step."""
import argparse
import json
import sys
from itertools import product
from pathlib import Path
from statistics import median

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

sys.path.insert(0, str(Path(__file__).parent))
import peer_gpu    # noqa: E402
from peer_gpu import Stopwatch, copy_speed, forget, machine    # noqa: E402

from peer_nb.models.mla import LatentAttention, rotary_angles    # noqa: E402

GUIDE = dict(hidden_size=768, num_attention_heads=12, num_key_value_heads=12, kv_lora_rank=512, q_lora_rank=1536,
             qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128)
TINY = dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=None,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)


def layers(shape, device, dtype):
    "Two layers with equal weights, and transformers' angles"
    torch.manual_seed(0)
    config = DeepseekV3Config(**shape, rope_parameters=dict(rope_type="default", rope_theta=1e4))
    config._attn_implementation = "sdpa"
    theirs, ours = deepseek.DeepseekV3Attention(config, 0).to(device, dtype), LatentAttention(config).to(device, dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs, deepseek.DeepseekV3RotaryEmbedding(config).to(device)


def steps(shape, batch, context, device, dtype):
    "One decoding step of each layer, on a cache that it is given back as it was"
    ours, theirs, rotary = layers(shape, device, dtype)
    g = torch.Generator(device).manual_seed(1)
    latent = torch.randn(batch, 1, context - 1, shape["kv_lora_rank"], generator=g, device=device).to(dtype)
    k_rope = torch.randn(batch, 1, context - 1, shape["qk_rope_head_dim"], generator=g, device=device).to(dtype)
    token, position = torch.randn(batch, 1, shape["hidden_size"], generator=g, device=device).to(dtype), torch.full((batch, 1), context - 1, device=device)
    our_angles = rotary_angles(position, shape["qk_rope_head_dim"])
    their_angles = rotary(token, position)

    class Past(DynamicCache):
        "Latents with the new token's put behind them, without growing"
        def update(self, a, b, layer, *rest):
            whole[0][:, :, -1:], whole[1][:, :, -1:] = a, b
            return whole

    whole = [torch.cat([t, t[:, :, :1]], 2) for t in (latent, k_rope)]
    return {"peer_nb": lambda: ours(token, our_angles, None, Past())[0], "transformers": lambda: theirs(token, their_angles, None, Past())[0]}


@torch.no_grad()
def check():
    "Equal outputs at tiny shapes"
    worst = 0.0
    for batch, context in ((1, 9), (3, 40)):
        ours, theirs = (f() for f in steps(TINY, batch, context, "cpu", torch.float32).values())
        worst = max(worst, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    print(f"largest relative difference {worst:.1e}; nothing was timed")
    if worst > 1e-5: sys.exit("the two layers differ")


@torch.no_grad()
def measure(shape, batch, context, repeats, bandwidth):
    "Medians of both layers in turns, and the floor"
    floor = batch * context * (shape["kv_lora_rank"] + shape["qk_rope_head_dim"]) * 2
    found = dict(batch=batch, context=context, floor_bytes=floor, floor_ms=floor / bandwidth / 1e6)
    calls, watch = steps(shape, batch, context, peer_gpu.DEVICE, torch.bfloat16), Stopwatch(torch)
    outputs, samples = {}, {name: [] for name in calls}
    for i in range(-3, repeats):
        for name, f in calls.items():
            if isinstance(samples[name], str): continue
            try:
                if i == -3: outputs[name] = f().float()
                taken = watch(f)
            except torch.OutOfMemoryError as e:
                samples[name] = f"out of memory: {str(e).splitlines()[0]}"
                forget(torch)
                continue
            if i >= 0: samples[name].append(round(taken, 4))
    if len(outputs) == 2:
        found["difference"] = ((outputs["peer_nb"] - outputs["transformers"]).abs().max() / outputs["transformers"].abs().max()).item()
    return found | {name: s if isinstance(s, str) else dict(ms=median(s), times_the_floor=median(s) / found["floor_ms"], samples=s) for name, s in samples.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens in the cache")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128], help="sequences")
    parser.add_argument("--repeats", type=int, default=20, help="timed rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the results go")
    parser.add_argument("--check", action="store_true", help="compare the layers at tiny shapes on the CPU; nothing timed")
    parser.add_argument("--tiny", action="store_true", help="the whole measurement at tiny shapes on the CPU; no GPU needed, nothing is kept")
    args = parser.parse_args()
    if args.check: return check()
    if args.tiny:
        peer_gpu.DEVICE, args.contexts, args.batches, args.repeats = "cpu", [4, 9], [1, 2], 1
        for found in run(TINY, args, lambda result: json.dumps(result))["shapes"]: print(f"{found['batch']} × {found['context']}: difference {found['difference']:.1e}")
        return print("every branch ran; nothing was kept")
    if not torch.cuda.is_available():
        print("mla_gpu.py: error: no CUDA device is visible to torch. --check and --tiny need none.", file=sys.stderr)
        sys.exit(2)
    run(GUIDE, args, lambda result: args.out.write_text(json.dumps(result, indent=1) + "\n"))


def run(shape, args, save):
    "All contexts and batches"
    bandwidth = copy_speed(torch)
    result = dict(schema=1, machine=machine(torch), clock="CUDA events, cold cache, medians of both layers in turns", dtype="bfloat16", layer=shape,
                  copy_gb_per_s=bandwidth, shapes=[])
    for context, batch in product(args.contexts, args.batches):
        result["shapes"].append(measure(shape, batch, context, args.repeats, bandwidth))
        save(result)
        forget(torch)
    return result


if __name__ == "__main__": main()
