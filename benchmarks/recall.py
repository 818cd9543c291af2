"""Recall of a memory task: `answer_batches` against transformers' `generate`, called with one question at a time.

    python benchmarks/recall.py                       prints a table
    python benchmarks/recall.py --json recall.json    also writes every sample

Both ask the same model the same questions, from text to text, and must give the same answers. Blocks alternate, so that
whatever else the machine does falls on both; what is measured is the process's CPU time, one thread. A model with random
weights knows nothing, so that every answer must be generated: the worst case for us. One that has learned its questions
by heart needs a forward pass only; the share of right answers stands beside each figure. `generate` gets as many tokens as the answer has, and its cache.
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
from transformers import LlamaConfig, LlamaForCausalLM

from peer_nb.config import Config, DatasetConfig, MLAConfig, ModelConfig, PeerConfig, to_dict
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.recall import TokenTexts, answer_batches, encode_questions, questions_of
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.tasks.writing import generate


def machine() -> dict:
    "Processor and cores, without names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(cpu=names[0] if names else platform.processor(), cores=len(names) or None, system=platform.system())


def peer(vocabulary: int) -> PeerMLAForCausalLM:
    "The demonstration's model: 3 layers of width 128, 4,096 experts in each"
    memory = PeerConfig(num_experts=4096, product_key_dim=[64, 64], num_heads=4, num_experts_per_tok=8, query_dim=64, query_norm="batch")
    cfg = ModelConfig(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, vocab_size=vocabulary, max_position_embeddings=128,
                      peer_start_layer=0, peer_config=memory, mla_config=MLAConfig(None, 64, 16, 32, 16))
    return PeerMLAForCausalLM(PeerMLAConfig(**to_dict(Config(cfg))["model_config"]))


def llama(vocabulary: int, width: int, layers: int) -> LlamaForCausalLM:
    "A Llama of transformers"
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=4*width, num_hidden_layers=layers, num_attention_heads=width//64,
                                        max_position_embeddings=128))


def memorise(model, rows: torch.Tensor, steps: int, lr: float = 2e-3):
    "Train until the answers are known"
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.)
    for _ in range(steps):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step(); optimizer.zero_grad()


def ours(model, tokenizer, questions) -> dict[str, str]:
    "Answers by id"
    return {r["id"]: r["said"] for batch in answer_batches(model, tokenizer, encode_questions(tokenizer, questions)) for r in batch}


def theirs(model, tokenizer, questions) -> dict[str, tuple[str, list[int]]]:
    "Answers and their tokens by id, one `generate` each"
    said = {}
    for q in questions:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(q.prompt, add_special_tokens=False)["input_ids"]]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(q.answer), do_sample=False, pad_token_id=tokenizer.pad_token_id,
                             eos_token_id=tokenizer.eos_token_id)
        tokens = out[0, ids.shape[1]:]
        said[q.id] = tokenizer.decode(tokens).split(" ")[0], tokens.tolist()
    return said


def measure(model, tokenizer, questions, sample, blocks: int) -> dict[str, list[float]]:
    "Milliseconds of CPU time for a question, by block"
    times, pieces = dict(peer_nb=[], transformers=[]), TokenTexts(tokenizer)   # several bytes may make one character: compared is what each token spells
    spelled = lambda q, tokens: pieces.said(encode_questions(tokenizer, [q])[0], tokens)[0]
    for block in range(blocks + 1):
        some = questions[block*sample % len(questions):][:sample]
        for name, answer, given in (("peer_nb", ours, questions), ("transformers", theirs, some)):
            start = time.process_time_ns()
            said = answer(model, tokenizer, given)
            if block: times[name].append((time.process_time_ns() - start)/1e6/len(given))   # the first is not counted
            if name == "peer_nb": kept = said
            elif wrong := [q.id for q in some if spelled(q, said[q.id][1]) != kept[q.id]]: raise SystemExit(f"the two say different things: {wrong}")
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="alternations")
    parser.add_argument("--questions", type=int, default=256, help="asked by us in each block")
    parser.add_argument("--sample", type=int, default=6, help="of these, asked by generate in each block")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = generate("digit_lookup", num_pairs=options.questions, num_known=options.questions, num_novel=0)["test_known"]
    questions = [questions_of("known", i, dict(zip(pairs, values)))[0] for i, values in enumerate(zip(*pairs.values()))]
    learned = torch.tensor([[tokenizer.eos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in pairs["text"][:16]])
    models = {"peer_mla, 128 wide, 3 layers": lambda: peer(len(tokenizer)), "llama, 64 wide, 2 layers": lambda: llama(len(tokenizer), 64, 2),
              "llama, 256 wide, 4 layers": lambda: llama(len(tokenizer), 256, 4)}
    results, load = [], [os.getloadavg()[0]]
    for name, build in models.items():
        torch.manual_seed(0)
        model = build().eval()
        for case, asked in {"untrained": questions, "trained": questions[:16]*(options.questions//16)}.items():
            if case == "trained" and "256" in name: continue        # learning takes longer than measuring
            if case == "trained": memorise(model.train(), learned, 150, 5e-3 if "64 wide" in name else 2e-3)
            model.eval()
            right = sum(ours(model, tokenizer, asked[:16])[q.id] == q.answer for q in asked[:16])/16
            times = measure(model, tokenizer, asked, options.sample, options.blocks)
            medians = {who: statistics.median(t) for who, t in times.items()}
            ratio = medians["transformers"]/medians["peer_nb"]
            results.append(dict(model=name, parameters=sum(p.numel() for p in model.parameters()), case=case, share_right=right, median_ms=medians, ratio=ratio, samples_ms=times))
            print(f"{name}, {case} ({right:.0%} right): ours {medians['peer_nb']:.3f} ms a question, generate {medians['transformers']:.1f} ms, {ratio:.0f} times", flush=True)
            if options.json: write(options, results, load)      # after each, since the whole takes minutes


def write(options, results: list[dict], load: list[float]):
    "All that is measured so far, and on what"
    about = dict(machine=machine(), torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version(), threads=torch.get_num_threads(), dtype="float32",
                 clock="process CPU time", task="digit_lookup, six digits, a token each", questions=options.questions, sample=options.sample, blocks=options.blocks,
                 load_average_before_and_after=[*load, os.getloadavg()[0]])
    options.json.write_text(json.dumps(about | dict(results=results), indent=1) + "\n")


if __name__ == "__main__": main()
