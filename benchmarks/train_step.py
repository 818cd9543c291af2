"""A training step on one CPU thread: this package's model beside models of equal size from elsewhere, in turns.

    pip install PEER-pytorch==0.2.2
    python benchmarks/train_step.py            # some five minutes; writes benchmarks/train_step.json

Forward, backward, clipping and AdamW on the same batches, in process CPU time. A pair is one step of each, in an order
that changes from pair to pair; what is told is the median over pairs of the ratio of their tokens per second."""
import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch
from torch import nn

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH, ROWS = 4096, 256, 4, 4, 256, 4
SIDE, MEMORY_HEADS, TOP_K, MEMORY_LAYERS = 128, 8, 16, [2, 3]
PEER_VERSION = "0.2.2"
WARM_UP = 2   # pairs that are not counted


def ours(inner=688, **memory):
    "The slim latent attention of configs/small.yaml"
    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    mla = dict(q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64)
    keys = dict(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=inner, vocab_size=VOCABULARY,
                max_position_embeddings=LENGTH, tie_word_embeddings=True, use_peer=False, mla_config=mla) | memory
    return PeerMLAForCausalLM(PeerMLAConfig(**keys))


def llama(inner):
    from transformers import LlamaConfig, LlamaForCausalLM
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=inner, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=LENGTH, tie_word_embeddings=True, attn_implementation="sdpa"))


def deepseek(inner):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    return DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=inner, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, first_k_dense_replace=LAYERS, q_lora_rank=None, kv_lora_rank=128, qk_nope_head_dim=32,
        qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=LENGTH, tie_word_embeddings=True, attn_implementation="sdpa"))


def with_peer():
    memory = dict(num_experts=SIDE**2, product_key_dim=[SIDE, SIDE], num_heads=MEMORY_HEADS, num_experts_per_tok=TOP_K, query_dim=WIDTH,
                  query_norm="none", batch_norm_query=False)
    return ours(use_peer=True, memory_layers=MEMORY_LAYERS, peer_config=memory)


class Theirs(nn.Module):
    "PEER-pytorch's layer where a memory layer stands"
    def __init__(self):
        super().__init__()
        from PEER_pytorch import PEER
        self.layer = PEER(WIDTH, heads=MEMORY_HEADS, num_experts=SIDE**2, num_experts_per_head=TOP_K, dim_key=WIDTH//2, non_competing_scores=False)

    def forward(self, hidden_states, mask=None): return self.layer(hidden_states)


def with_their_peer():
    "The same model, but for the two layers"
    model = with_peer()
    for layer in MEMORY_LAYERS: model.model.layers[layer].memory = Theirs()
    return model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def equal_size(make, target):
    "The width of the feed-forward that brings a model to a number of parameters"
    low, high = make(64), make(128)
    return round(64 + 64 * (target - parameters(low)) / (parameters(high) - parameters(low)))


class Step:
    "One bare training step"
    def __init__(self, model):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def __call__(self, ids):
        loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def seconds(step, argument):
    start = time.process_time()
    step(argument)
    return time.process_time() - start


def pairs(one, other, arguments):
    "Seconds of both, in turns"
    found = []
    for i, argument in enumerate(arguments):
        both = [(one, 0), (other, 1)] if i % 2 else [(other, 1), (one, 0)]
        times = [0.0, 0.0]
        for step, place in both: times[place] = seconds(step, argument)
        if i >= WARM_UP: found.append(times)
    return found


def compared(name, other_name, found, tokens, need, **more):
    "What a comparison says"
    ratios = sorted(b / a for a, b in found)
    speed = [tokens / median(column) for column in zip(*found)]
    line = dict(ours=name, other=other_name, tokens_per_second=[round(s, 1) for s in speed], ratio=round(median(ratios), 3),
                smallest=round(ratios[0], 3), largest=round(ratios[-1], 3), wanted=need, **more)
    print(f"{name} against {other_name}: {line['ratio']:.3f} (wanted {need})", flush=True)
    return line


def loop_overhead(count):
    "The trainer's step beside a bare one on the same batches, which reads them too"
    import tempfile
    from peer_nb.config import apply_overrides, load_config
    from peer_nb.training.loop import Trainer
    folder = Path(tempfile.mkdtemp())
    (folder/"text.jsonl").write_text("\n".join(json.dumps({"text": f"{a} times {b} is {a*b}. " * 8}) for a in range(99) for b in range(99)))
    cfg = apply_overrides(load_config(Path(__file__).parents[1]/"configs"/"small.yaml"), {"dataset_config.tokenizer_name": "bytes",
        "dataset_config.datasets": [dict(name="text", path=str(folder/"text.jsonl"))], "train_config.output_dir": str(folder/"run")})
    trainer, other = Trainer(cfg), Trainer(cfg)
    bare = Step(other.model)

    def bare_step(_):
        batch = next(other.batches)
        loss = other.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        bare.optimizer.step()
        bare.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return pairs(lambda _: trainer.step(), bare_step, range(count + WARM_UP))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".json")))
    options = parser.parse_args()
    if (found := importlib.metadata.version("PEER-pytorch")) != PEER_VERSION: sys.exit(f"PEER-pytorch {found} is installed; the comparison is with {PEER_VERSION}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    load, lines = os.getloadavg(), []
    batches = [torch.randint(0, VOCABULARY, (ROWS, LENGTH)) for _ in range(options.pairs + WARM_UP)]
    model = ours()
    for name, make in (("transformers' Llama", llama), ("transformers' DeepSeek-V3, dense", deepseek)):
        peer = make(equal_size(make, parameters(model)))
        sizes = [parameters(model), parameters(peer)]
        assert abs(sizes[0] / sizes[1] - 1) < 0.02, sizes
        lines.append(compared("without memory", name, pairs(Step(model), Step(peer), batches), ROWS*LENGTH, 0.97, parameters=sizes))
    mine, theirs = with_peer(), with_their_peer()
    sizes = [parameters(mine), parameters(theirs)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02, sizes
    lines.append(compared("with PEER", "the same with PEER-pytorch's layer", pairs(Step(mine), Step(theirs), batches), ROWS*LENGTH, 2.0, parameters=sizes))
    lines.append(compared("the loop's step", "a bare step", loop_overhead(options.pairs), ROWS*LENGTH, 0.98))
    report = dict(machine=dict(cpu=platform.processor() or platform.machine(), cores=os.cpu_count(), load_before=[round(x, 2) for x in load]), torch=torch.__version__,
        transformers=importlib.metadata.version("transformers"), threads=1, clock="process CPU time", pairs=options.pairs,
        model=f"width {WIDTH}, {LAYERS} layers, {HEADS} heads, {ROWS} x {LENGTH} tokens, vocabulary {VOCABULARY}; memory {SIDE}² experts, {MEMORY_HEADS} x {TOP_K}, layers {MEMORY_LAYERS}",
        comparisons=lines)
    Path(options.output).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__": main()
