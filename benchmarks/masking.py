"""What masks cost: beside tokenising the same text, and beside a training step of a small model. One CPU thread.

    python benchmarks/masking.py                        prints a table, about a minute
    python benchmarks/masking.py --json masking.json    also writes every sample

Tokenising is the collator's one call for a batch of documents: text to lists of ids. Masking is all that the collator does for the labels
of the same batch: the text is rebuilt from the ids, the rule applied, characters lifted to tokens. The two alternate,
so that whatever else the machine does falls on both; what is measured is the process's CPU time. The training step is
forward, backward and AdamW of a small model with memory layers on a padded batch of the collator; its mask is made for
that batch.
"""
import argparse
import json
import os
import platform
import random
import statistics
import string
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from peer_nb.config import DatasetConfig
from peer_nb.data.collate import DataCollatorForLanguageModelingVarLen, count_targets
from peer_nb.data.corpora import EOS, load_tokenizer, train_bpe
from peer_nb.data.packing import encode
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM

BPE_SIZE = 1024
MODEL = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, peer_start_layer=0,
             mla_config=dict(q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32),
             peer_config=dict(num_experts=4096, product_key_dim=[64, 64], num_heads=4, num_experts_per_tok=8, query_dim=64))


def machine() -> dict:
    "Processor and cores, without names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(cpu=names[0] if names else platform.processor(), cores=len(names) or None, system=platform.system())


def corpora(documents: int) -> dict[str, tuple[str, list[str]]]:
    "Texts by name, and the mask of each"
    draw = random.Random(0)
    number = lambda: f"{draw.randrange(10**6):06d}"
    word = lambda: "".join(draw.choices(string.ascii_letters, k=8))
    pairs = lambda n: "".join(f"{number()}:{number()} " for _ in range(n))
    lines = lambda n, quote: "".join(f"{word()} = {quote}{word()}{quote}\n" for _ in range(n))
    hops = lambda: lines(60, "") + lines(20, "'") + "COMPLETION:\nHops=2\n\nCoT=False\n\n" + lines(10, "'")
    question = lambda: f"What is the number of entity {number()} in the long list of things that are known? It is {number()}"
    many = lambda make, n=documents: [make() for _ in range(n)]
    return {"pairs, one a document": ("digit_lookup", many(lambda: pairs(1), 16*documents)), "pairs, 64 a document": ("digit_lookup", many(lambda: pairs(64))),
            "questions": ("qa", many(question, 4*documents)), "hash chains": ("hashhop", many(hops))}


def tokenisers(texts: list[str]) -> dict:
    "A token a byte, and a BPE of these texts"
    made = Tokenizer.from_str(train_bpe(texts, BPE_SIZE))
    return {"bytes": load_tokenizer(DatasetConfig(tokenizer_name="bytes")), f"bpe {BPE_SIZE}": PreTrainedTokenizerFast(tokenizer_object=made, eos_token=EOS, pad_token=EOS)}


def alternate(steps: dict, repeats: int) -> dict[str, list[float]]:
    "Milliseconds of CPU time of each step, by name; the first round is not counted"
    samples = {name: [] for name in steps}
    for i in range(repeats + 1):
        for name, step in steps.items():
            start = time.process_time_ns()
            step()
            if i: samples[name].append((time.process_time_ns() - start)/1e6)
    return samples


def beside_tokenising(task: str, texts: list[str], tokenizer, repeats: int) -> dict:
    "Samples of tokenising and of masking"
    collate = DataCollatorForLanguageModelingVarLen(tokenizer, **{f"apply_{task}_mask": True})
    examples = collate.gather(texts)
    samples = alternate(dict(tokenise=lambda: encode(texts, tokenizer), mask=lambda: collate.labelled(examples)), repeats)
    return dict(tokens=len(examples.ids), documents=len(texts), samples_ms=samples)


def beside_training(task: str, texts: list[str], tokenizer, repeats: int, rows: int = 8, length: int = 128) -> dict:
    "Samples of a training step and of masking its batch"
    torch.manual_seed(0)
    model = PeerMLAForCausalLM(PeerMLAConfig(vocab_size=len(tokenizer), **MODEL)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    collate = DataCollatorForLanguageModelingVarLen(tokenizer, max_length=length, **{f"apply_{task}_mask": True})
    examples = collate.shortened(collate.gather(texts[:rows]))
    batch = collate(texts[:rows])

    def step():
        model(**batch, num_items_in_batch=max(count_targets(batch), 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return dict(batch=list(batch["input_ids"].shape), samples_ms=alternate(dict(step=step, mask=lambda: collate.labelled(examples)), repeats))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="alternations")
    parser.add_argument("--documents", type=int, default=256, help="documents of a batch; four times as many short ones, sixteen times as many very short ones")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results, load = [], [os.getloadavg()[0]]
    for name, (task, texts) in corpora(options.documents).items():
        for kind, tokenizer in tokenisers(texts).items():
            for against, measure in (("tokenise", beside_tokenising), ("step", beside_training)):
                found = measure(task, texts, tokenizer, options.repeats)
                medians = {step: statistics.median(times) for step, times in found["samples_ms"].items()}
                share = medians["mask"]/medians[against]
                results.append(dict(text=name, mask=task, tokenizer=kind, against=against, share=share, median_ms=medians, **found))
                print(f"{name:22} {kind:9} masking {medians['mask']:7.3f} ms, {against:8} {medians[against]:8.2f} ms: {share:.2%}")
    if options.json:
        about = dict(machine=machine(), python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__,
                     tokenizers=tokenizers.__version__, threads=1, clock="process CPU time", repeats=options.repeats, model=MODEL,
                     load_average_before_and_after=[*load, os.getloadavg()[0]])
        options.json.write_text(json.dumps(about | dict(results=results), indent=1) + "\n")


if __name__ == "__main__": main()
