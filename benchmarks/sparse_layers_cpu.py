"""Sparse layers on one CPU thread at equal active FLOPs: a forward pass, a forward and a backward pass, a training loop.

    pip install PEER-pytorch==0.2.2
    python benchmarks/sparse_layers_cpu.py           # some minutes; writes benchmarks/sparse_layers_cpu.json
    python benchmarks/sparse_layers_cpu.py --tiny    # every branch of it, in seconds; writes nothing

Sizes are those of the axis `sparse_layer`: every layer is solved to the active FLOPs and the parameters of a PEER layer.
Beside them stand transformers' own mixture of experts (eager, and by grouped_mm) with the weights of ours, and
PEER-pytorch. UltraMem and Engram are measured with the feed-forward of their block, which is narrower for them in all
blocks; only the training loop compares them fairly. All are measured in turns; times are process CPU time, and the load
of the machine is noted."""
import argparse
import json
import os
import platform
import resource
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch

WIDTH, TOKENS, WARM_UP = 256, 512, 2


def base(side, tiny):
    "A model with one PEER layer"
    from peer_nb.config import config_from_dict
    heads, k, query = (2, 4, 32) if tiny else (8, 16, 128)
    return config_from_dict(dict(
        model_config=dict(hidden_size=64 if tiny else WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128 if tiny else 704, vocab_size=259,
                          max_position_embeddings=128, memory_layers=[1], tie_word_embeddings=True,
                          peer_config=dict(num_experts=side**2, product_key_dim=[side, side], num_heads=heads, num_experts_per_tok=k, query_dim=query, query_norm="layer"),
                          mla_config=dict(q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)),
        train_config=dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=3 if tiny else 30, logging_steps=1, save_steps=10_000, eval_steps=10_000,
                          learning_rate=1e-3, log_level="error"),
        dataset_config=dict(tokenizer_name="bytes", max_seq_length=128, datasets=[dict(name="docs", path="python:docs")]),
        eval_config=dict(max_tokens=256)))


class SideBySide(torch.nn.Module):
    "A feed-forward, and what stands beside it or before it: UltraMem, or n-grams with the addresses of random tokens"
    def __init__(self, block):
        super().__init__()
        self.mlp, self.other, self.engram = block.mlp, getattr(block, "memory", None), getattr(block, "engram", None)
        if self.engram is not None: self.engram.take_tokens(1000)

    def forward(self, x):
        if self.engram is None: return self.mlp(x) + self.other(x)
        reach = torch.arange(x.shape[1])[None]
        tokens = torch.randint(0, 1000, x.shape[:2])
        return self.mlp(x) + self.engram(x, self.engram.addresses(tokens, 0, reach), reach)


def layer_of(m):
    "The feed-forward of the last block of a model, with what stands beside it"
    from peer_nb.models.causal_lm import DecoderLayer, PeerMLAConfig
    torch.manual_seed(0)
    block = DecoderLayer(PeerMLAConfig(**asdict(m)), m.num_hidden_layers - 1)
    if hasattr(block, "engram") or hasattr(block, "memory") and hasattr(block, "mlp"): return SideBySide(block)
    return block.memory if hasattr(block, "memory") else block.mlp


def transformers_moe(layer, m, implementation):
    "Transformers' layer with the weights of ours"
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    keys = ("n_routed_experts", "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
    config = DeepseekV3Config(hidden_size=m.hidden_size, **{key: getattr(m.moe_config, key) for key in keys})
    config._experts_implementation = implementation
    theirs = DeepseekV3MoE(config)
    theirs.load_state_dict(layer.state_dict(), strict=bool(m.moe_config.n_shared_experts))
    return theirs


def peer_pytorch(m):
    from PEER_pytorch import PEER
    p = m.peer_config
    return PEER(m.hidden_size, heads=p.num_heads, num_experts=p.num_experts, num_experts_per_head=p.num_experts_per_tok, dim_key=p.query_dim//2, non_competing_scores=False)


def cpu_ms(f):
    start = resource.getrusage(resource.RUSAGE_SELF)
    f()
    end = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3*(end.ru_utime - start.ru_utime + end.ru_stime - start.ru_stime)


def passes(layers, width, repeats):
    "Milliseconds of each layer, taken in turns"
    x, g = torch.randn(1, TOKENS, width), torch.randn(1, TOKENS, width)
    samples = {name: {"forward": [], "forward + backward": []} for name in layers}

    def forward(layer):
        with torch.no_grad(): layer(x)

    def both(layer):
        layer(x.requires_grad_()).backward(g)
        for p in layer.parameters(): p.grad = None

    for i in range(-WARM_UP, repeats):
        for name, layer in layers.items():
            for what, f in (("forward", forward), ("forward + backward", both)):
                taken = cpu_ms(lambda: f(layer))
                if i >= 0: samples[name][what].append(taken)
    return {name: {what: {"ms": round(median(v), 2), "samples": [round(t, 2) for t in v]} for what, v in found.items()} for name, found in samples.items()}


def loop_speed(config, overrides):
    "Tokens per second of CPU time in the training loop, without its evaluation"
    from peer_nb.config import apply_overrides
    from peer_nb.training.loop import Trainer
    with tempfile.TemporaryDirectory() as out:
        trainer = Trainer(apply_overrides(config, {**overrides, "train_config.output_dir": out}))
        for _ in range(WARM_UP): trainer.step()
        steps = config.train_config.max_steps - WARM_UP
        before = trainer.counters.tokens
        taken = cpu_ms(lambda: [trainer.step() for _ in range(steps)])
        return round(1e3*(trainer.counters.tokens - before)/taken, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="every branch, in seconds; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from peer_nb.study.sparse_layer import residual_of, solved, sparse_layer_levels
    load, config = os.getloadavg(), base(16 if options.tiny else 256, options.tiny)
    m, (levels, left_out) = config.model_config, sparse_layer_levels(config)
    arms = {kind: replace(solved(m, kind, 128)) for kind in levels}
    layers = {kind: layer_of(arm) for kind, arm in arms.items()}
    ways = ("eager", "grouped_mm") if arms["moe"].moe_config.moe_intermediate_size % 4 == 0 else ("eager",)   # rows of whole 16 bytes
    layers |= {f"moe, transformers {way}": transformers_moe(layers["moe"], arms["moe"], way) for way in ways}
    layers["peer, PEER-pytorch"] = peer_pytorch(m)
    x = torch.randn(1, 7, m.hidden_size)
    difference = (layers["moe"](x) - layers["moe, transformers eager"](x)).abs().max().item()
    assert arms["moe"].moe_config.n_shared_experts == 0 or difference < 1e-5, f"ours differs from transformers' experts: {difference}"
    found = passes(layers, m.hidden_size, 2 if options.tiny else options.repeats)
    for what in ("forward", "forward + backward"):
        ratio = found["moe, transformers eager"][what]["ms"]/found["moe"][what]["ms"]
        print(f"{what}: " + ", ".join(f"{name} {times[what]['ms']} ms" for name, times in found.items()) + f"; moe beside transformers eager {ratio:.2f}x")
    speeds = {kind: loop_speed(config, overrides) for kind, overrides in levels.items()}
    print("training loop, tokens per second of CPU time:", speeds)
    report = dict(width=m.hidden_size, tokens=TOKENS, threads=1, torch=torch.__version__, machine=platform.processor() or platform.machine(), load_before=load, load_after=os.getloadavg(),
                  left_out=left_out, arms={kind: residual_of(arm, m, 128)._asdict() | {"overrides": levels[kind]} for kind, arm in arms.items()}, layers=found, loop_tokens_per_second=speeds)
    if not options.tiny: Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
