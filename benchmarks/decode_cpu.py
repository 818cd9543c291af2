"""One decoding step of the attention layer: ours against transformers' DeepSeek-V3, side by side in one process.

    python benchmarks/decode_cpu.py                       prints a table
    python benchmarks/decode_cpu.py --json decode.json    also writes every sample

Both layers have the same weights, get the same token and the same past (a `DynamicCache` of latents), and must give
the same output. Blocks of steps alternate, so that whatever else the machine does falls on both; what is measured is
the process's CPU time. A few large sums before each block of steps push the weights out of the caches, as the other
layers of a model would.
"""
import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from peer_nb.models.mla import LatentAttention, rotary_angles

HEADS, HIDDEN, RANK, ROPE, NOPE, VALUE, CONTEXT = 12, 768, 512, 64, 128, 128, 2048


def machine() -> dict:
    "Processor and cores, without names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(cpu=names[0] if names else platform.processor(), cores=len(names) or None, system=platform.system())


def layers(q_lora_rank: int | None):
    "The two layers with equal weights, and a step for each"
    torch.manual_seed(0)
    config = DeepseekV3Config(hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, kv_lora_rank=RANK, q_lora_rank=q_lora_rank,
                              qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE, rope_parameters=dict(rope_type="default", rope_theta=1e4))
    config._attn_implementation = "sdpa"
    theirs, ours, rotary = deepseek.DeepseekV3Attention(config, 0), LatentAttention(config), deepseek.DeepseekV3RotaryEmbedding(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    past, token, position = torch.randn(1, CONTEXT - 1, HIDDEN), torch.randn(1, 1, HIDDEN), torch.tensor([[CONTEXT - 1]])
    latent, k_rope = ours.latents(past, *rotary_angles(torch.arange(CONTEXT - 1)[None], ROPE))
    our_angles, their_angles = rotary_angles(position, ROPE), rotary(token, position)

    def cache():
        fresh = DynamicCache()
        fresh.update(latent, k_rope, 0)
        return fresh

    return {"peer_nb": (cache, lambda past: ours(token, our_angles, None, past)[0]),
            "transformers": (cache, lambda past: theirs(token, their_angles, None, past)[0])}


def measure(steps: dict, blocks: int, block: int) -> dict[str, list[float]]:
    "Milliseconds of CPU time of each step, by layer"
    samples, other = {name: [] for name in steps}, torch.ones(32 << 20)     # 128 MB that belong to nobody
    for _ in range(blocks):
        for name, (cache, step) in steps.items():
            pasts = [cache() for _ in range(block)]
            for past in pasts:
                other.sum()
                start = time.process_time_ns()
                step(past)
                samples[name].append((time.process_time_ns() - start) / 1e6)
    return samples


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="alternations")
    parser.add_argument("--block", type=int, default=4, help="steps of one layer before the other's turn")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, load = [], [os.getloadavg()[0]]
    for q_lora_rank in (1536, None):
        steps = layers(q_lora_rank)
        outputs = [step(cache()) for cache, step in steps.values()]
        difference = (outputs[0] - outputs[1]).abs().max().item()
        if difference > 2e-6: raise SystemExit(f"the two layers differ by {difference}: nothing to compare")
        measure(steps, 1, options.block)     # not counted
        samples = measure(steps, options.blocks, options.block)
        medians = {name: statistics.median(times) for name, times in samples.items()}
        ratio = medians["transformers"] / medians["peer_nb"]
        results.append(dict(q_lora_rank=q_lora_rank, median_ms=medians, ratio=ratio, largest_difference=difference, samples_ms=samples))
        print(f"q_lora_rank {q_lora_rank}: ours {medians['peer_nb']:.2f} ms, transformers {medians['transformers']:.2f} ms, 1/{ratio:.1f} (outputs differ by {difference:.1e})")
    if options.json:
        about = dict(machine=machine(), torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version(),
                     threads=torch.get_num_threads(), dtype="float32", clock="process CPU time", heads=HEADS, hidden_size=HIDDEN, kv_lora_rank=RANK,
                     qk_rope_head_dim=ROPE, qk_nope_head_dim=NOPE, v_head_dim=VALUE, context=CONTEXT, batch=1,
                     repeats=options.blocks * options.block, load_average_before_and_after=[*load, os.getloadavg()[0]])
        options.json.write_text(json.dumps(about | dict(results=results), indent=1) + "\n")


if __name__ == "__main__": main()
