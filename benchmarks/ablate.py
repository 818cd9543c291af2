"""Ablating every key of a memory exactly, against one whole evaluation per key, on the same model, threads and batch.

    python benchmarks/ablate.py [OUTPUT.json]

Both sides run in float64 and in turns. The naive side zeroes a key's value and asks all questions again; it is timed on a sample
of keys, half of them retrieved by some question, and multiplied up. Every sampled key's effects are compared.
Seconds are those that the processor spent on this one thread, so that what runs beside it does not count; the load is noted.
"""
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from peer_nb.analysis.interventions import answers_of, clean_pass, effects_of, first_order
from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.recall import encode_questions, questions_in
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.tasks.registry import find_task
from peer_nb.tasks.writing import generate

PAIRS, SAMPLE, QUESTIONS = 3, 8, 64


def model_of(side: int, layers: int, memory: int) -> PeerMLAForCausalLM:
    "The model of configs/memory with side² rows"
    torch.manual_seed(0)
    peer = dict(num_experts=side*side, product_key_dim=[side, side], num_heads=4, num_experts_per_tok=8, query_dim=64, query_norm="batch")
    attention = dict(q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
    config = PeerMLAConfig(hidden_size=128, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=256, vocab_size=257, max_position_embeddings=120,
                           tie_word_embeddings=True, memory_layers=[memory], memory_kind="pkm", initializer_range=.2, peer_config=peer, mla_config=attention)
    model = PeerMLAForCausalLM(config).double().eval()
    torch.nn.init.normal_(model.model.layers[memory].memory.values.weight)
    return model


@torch.no_grad()
def evaluate(model, answers) -> torch.Tensor:
    "Log-probability and exactness of every answer, by a whole forward pass"
    hidden = model.model(input_ids=answers.ids, use_cache=False).last_hidden_state
    rows = torch.arange(len(hidden))[:, None]
    logp = model.lm_head(hidden[rows, answers.place]).log_softmax(-1)
    exact = (logp.argmax(-1) == answers.target).all(-1)
    return torch.stack([logp.gather(-1, answers.target[..., None])[..., 0].sum(-1), exact.double()])


@torch.no_grad()
def naive(model, answers, memory: int, keys: list[int]) -> tuple[float, list[torch.Tensor]]:
    "Seconds per key, and the results"
    table, found, start = model.model.layers[memory].memory.values.weight, [], time.process_time()
    for key in keys:
        kept = table[key].clone()
        table[key] = 0
        found.append(evaluate(model, answers))
        table[key] = kept
    return (time.process_time() - start) / len(keys), found


def exact(model, answers, memory: int):
    "Seconds for all keys, and the results"
    start = time.process_time()
    clean = clean_pass(model, answers, [memory])
    parts = list(effects_of(model, clean, [memory]))
    return time.process_time() - start, clean, parts


def layer_tokens(model, run) -> int:
    "How many tokens go through a layer while something runs, over all layers: what there is to compute, whatever it costs"
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel())) for layer in model.model.layers]
    try: run()
    finally:
        for hook in hooks: hook.remove()
    return sum(seen)


def compare(clean, parts, keys: list[int], naive_results) -> tuple[float, int, float]:
    "Largest difference of a log-probability; answers that are exact on one side only; the largest effect among those compared"
    unit, example, logprob, right = (torch.cat([getattr(p, name) for p in parts]) for name in ("unit", "example", "logprob", "exact"))
    worst, differ, effect = 0.0, 0, 0.0
    for key, (truth, is_exact) in zip(keys, naive_results):
        mine = torch.stack([clean.logprob.sum(-1), clean.right.all(-1).double()])
        chosen = unit == key
        mine[0, example[chosen]], mine[1, example[chosen]] = logprob[chosen], right[chosen].double()
        worst, differ = max(worst, (mine[0] - truth).abs().max().item()), differ + int((mine[1] != is_exact).sum())
        effect = max(effect, (truth - clean.logprob.sum(-1)).abs().max().item())
    return worst, differ, effect


def prescreen(model, answers, clean, parts, memory: int) -> float:
    "Rank correlation of a first-order guess with the exact effects"
    from scipy.stats import spearmanr
    guess, r = first_order(model, answers, [memory])[memory], clean.layers[memory]
    length, before = answers.ids.shape[1], clean.logprob.sum(-1)
    unit, example, logprob = (torch.cat([getattr(p, name) for p in parts]) for name in ("unit", "example", "logprob"))
    guess, index = (t.unflatten(0, (-1, length)).flatten(1) for t in (guess, r.index))
    first = torch.stack([guess[e][index[e] == u].sum() for e, u in zip(example.tolist(), unit.tolist())])
    return float(spearmanr(first.numpy(), (logprob - before[example]).numpy()).statistic)


def measure(side: int, layers: int, memory: int, answers) -> dict:
    model, rng = model_of(side, layers, memory), torch.Generator().manual_seed(1)
    _, clean, parts = exact(model, answers, memory)                              # warm
    used = torch.cat([p.unit for p in parts]).unique()
    some = used[torch.randperm(len(used), generator=rng)[:SAMPLE//2]].tolist()
    keys = some + torch.randint(0, side*side, (SAMPLE - len(some),), generator=rng).tolist()
    naive(model, answers, memory, keys[:2])
    rounds, worst, differ = [], 0.0, 0
    for _ in range(PAIRS):
        per_key, results = naive(model, answers, memory, keys)
        seconds, clean, parts = exact(model, answers, memory)
        difference, other, effect = compare(clean, parts, keys, results)
        worst, differ = max(worst, difference), differ + other
        rounds.append(dict(naive_seconds=per_key*side*side, exact_seconds=seconds, ratio=per_key*side*side/seconds))
    pairs = sum(len(p.unit) for p in parts)
    fewer = side*side*layer_tokens(model, lambda: evaluate(model, answers)) / layer_tokens(model, lambda: exact(model, answers, memory))
    return dict(rows=side*side, layers=layers, memory_layer=memory, questions=len(answers.ids), tokens=answers.ids.shape[1], pairs_computed=pairs,
                pairs_in_all=side*side*len(answers.ids), naive_keys_timed=len(keys), naive_is="timed on a sample of keys and multiplied by their number", rounds=rounds,
                median_ratio=statistics.median(r["ratio"] for r in rounds), fewer_layer_tokens=fewer, largest_logprob_difference=worst, exact_match_differences=differ, largest_effect_compared=effect,
                first_order_spearman=prescreen(model, answers, clean, parts, memory))


if __name__ == "__main__":
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    data = generate("digit_lookup", num_pairs=QUESTIONS, num_known=QUESTIONS, num_novel=1)
    answers = answers_of(encode_questions(tokenizer, questions_in(find_task("digit_lookup"), {"test_known": data["test_known"]})))
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    result = dict(benchmark="ablate", threads=1, dtype="float64", torch=torch.__version__, python=platform.python_version(), cpu=platform.processor() or platform.machine(), pairs=PAIRS,
                  clock="process_time: CPU seconds of the one thread", load_average=os.getloadavg()[0], cases=[])
    for side, layers, memory in ((64, 2, 1), (64, 3, 1), (1024, 2, 1), (1024, 3, 1)):
        case = measure(side, layers, memory, answers)
        result["cases"].append(case)
        print(f"{case['rows']:>9,} rows, memory in layer {memory} of {layers}: {case['median_ratio']:,.0f} times as fast ({case['fewer_layer_tokens']:,.0f} times fewer tokens through layers), difference {case['largest_logprob_difference']:.1e} at effects up to {case['largest_effect_compared']:.2g}, "
              f"exact match differs {case['exact_match_differences']}, first order {case['first_order_spearman']:.2f}", flush=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
