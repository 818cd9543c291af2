"""Adapter training on one CPU thread: this package's loop beside peft with transformers' Trainer, in turns.

    python benchmarks/lora.py            # some minutes; writes benchmarks/lora.json

The same OPT with random weights, the same adapters, the same batches. A round is so many steps of each, in an order that
changes from round to round, in process CPU time; what is told is the median over rounds of the ratio of their tokens per
second. Peak memory is that of two further processes that each run one of them. Losses are compared first."""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import torch

WIDTH, LAYERS, HEADS, LENGTH, ROWS, RANK, WARM_UP = 256, 4, 4, 256, 4, 16, 2


def base(folder: Path) -> Path:
    "An OPT with a tokenizer"
    from transformers import OPTConfig, OPTForCausalLM

    from peer_nb.config import DatasetConfig
    from peer_nb.data.corpora import load_tokenizer
    if not (folder/"config.json").exists():
        torch.manual_seed(0)
        OPTForCausalLM(OPTConfig(vocab_size=4096, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=4*WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                                 max_position_embeddings=LENGTH, dropout=0.0, bos_token_id=256, eos_token_id=256, pad_token_id=256)).save_pretrained(folder)
        load_tokenizer(DatasetConfig(tokenizer_name="bytes")).save_pretrained(folder)
    return folder


class Ours:
    "Our loop's steps"
    def __init__(self, folder: Path, steps: int):
        from peer_nb.config import config_from_dict
        from peer_nb.training.loop import Trainer
        train = dict(output_dir=str(folder/"ours"), per_device_train_batch_size=ROWS, gradient_accumulation_steps=1, learning_rate=1e-3, weight_decay=0.0, max_steps=1000,
                     lr_scheduler_type="constant", warmup_ratio=0.0)
        data = dict(datasets=[dict(name="source", path="python:stdlib")], max_seq_length=LENGTH)
        self.trainer = Trainer(config_from_dict(dict(model_config=dict(pretrained=str(base(folder/"base"))), train_config=train, dataset_config=data, lora_config=dict(rank=RANK))))
        self.steps = steps

    def round(self) -> tuple[float, float]:
        "CPU seconds of the counted steps, last loss"
        for _ in range(WARM_UP): self.trainer.step()
        start = time.process_time()
        for _ in range(self.steps): loss = self.trainer.step().loss
        return time.process_time() - start, loss


class Theirs:
    "peft and transformers' Trainer on the rows that our loader gives"
    def __init__(self, folder: Path, steps: int, rows: list, adapters: dict):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(base(folder/"base"), dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
        self.model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
        for name, p in self.model.named_parameters():
            if p.requires_grad: p.data.copy_(adapters[name.removeprefix("base_model.model.")])
        self.folder, self.steps, self.rows, self.at = folder, steps, rows, 0

    def round(self) -> tuple[float, float]:
        from transformers import Trainer, TrainerCallback, TrainingArguments
        from torch.utils.data import SequentialSampler
        clock = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_, **__): clock.append(time.process_time())

        class InOrder(Trainer):
            def _get_train_sampler(self, *_): return SequentialSampler(self.train_dataset)
            def training_step(self, *words, **keys):
                self.last = super().training_step(*words, **keys)
                return self.last

        steps = self.steps + WARM_UP
        rows = self.rows[self.at:self.at + steps*ROWS]
        self.at += steps*ROWS
        arguments = TrainingArguments(self.folder/"theirs", max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=1e-3, weight_decay=0.0, adam_beta2=0.95,
                                      lr_scheduler_type="constant", max_grad_norm=1.0, report_to=[], use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True)
        trainer = InOrder(self.model, arguments, train_dataset=[dict(input_ids=r, attention_mask=torch.ones_like(r), labels=r) for r in rows], callbacks=[Clock()])
        trainer.train()
        return clock[-1] - clock[WARM_UP - 1], float(trainer.last)


def loader_rows(ours: Ours, steps: int) -> tuple[list, dict]:
    "The rows that another trainer of the same configuration reads, and the adapters that it begins with"
    from peer_nb.training.loop import Trainer
    other = Trainer(ours.trainer.cfg)
    adapters = {name: p.detach().clone() for name, p in other.model.named_parameters() if p.requires_grad}
    return [row for _ in range(steps) for batch in other.read_batches() for row in batch["input_ids"]], adapters


def alone(what: str, place: Path, steps: int) -> int:
    "Peak memory of a process that runs one of them, bytes"
    side = Ours(place, steps) if what == "ours" else Theirs(place, steps, **torch.load(place/"rows.pt"))
    side.round()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024


def peaks_of(place: Path, rows: list, adapters: dict, steps: int) -> dict[str, int]:
    "Peak memory of both, each in a process of its own"
    torch.save(dict(rows=rows[:(steps + WARM_UP)*ROWS], adapters=adapters), place/"rows.pt")
    def run(who): return subprocess.run([sys.executable, __file__, "--alone", who, "--place", str(place), "--steps", str(steps)], capture_output=True, text=True, check=True)
    return {who: int(run(who).stdout.split()[-1]) for who in ("ours", "theirs")}


def measure(rounds: int, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ours = Ours(folder, steps)
        rows, adapters = loader_rows(ours, rounds*(steps + WARM_UP))
        theirs = Theirs(folder, steps, rows, adapters)
        pairs = []
        for n in range(rounds):
            found = {who: side.round() for who, side in ((("ours", ours), ("theirs", theirs)) if n % 2 else (("theirs", theirs), ("ours", ours)))}
            # later rounds differ: transformers' Trainer begins each with new moments
            if n == 0 and abs(found["ours"][1] - found["theirs"][1]) > 1e-3: raise SystemExit(f"losses differ: {found}")
            pairs.append({who: round(seconds, 4) for who, (seconds, _) in found.items()} | dict(loss=found["ours"][1]))
            print(pairs[-1], flush=True)
            if n == 0: first = found
        peaks = peaks_of(folder, rows, adapters, steps)
    tokens = steps*ROWS*LENGTH
    return dict(what=f"OPT of width {WIDTH}, {LAYERS} layers, adapters of rank {RANK} on all matrices, {ROWS} rows of {LENGTH}", steps=steps, rounds=pairs,
                tokens_per_second={who: round(tokens/median(p[who] for p in pairs)) for who in ("ours", "theirs")},
                speed_ratio=round(median(p["theirs"]/p["ours"] for p in pairs), 3), peak_memory_bytes=peaks, memory_ratio=round(peaks["ours"]/peaks["theirs"], 3),
                first_losses={who: loss for who, (_, loss) in first.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--alone", choices=["ours", "theirs"], help="only this side, for its peak memory")
    parser.add_argument("--place", type=Path, help="with --alone: where the model and the rows lie")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.alone: return print(alone(given.alone, given.place, given.steps))
    import peft
    import transformers
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    found = dict(machine=dict(cpu=cpu, cores=os.cpu_count(), system=platform.system()), threads=1, clock="process CPU time", torch=torch.__version__,
                 transformers=transformers.__version__, peft=peft.__version__, load=os.getloadavg()[0]) | measure(given.rounds, given.steps)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({k: found[k] for k in ("tokens_per_second", "speed_ratio", "memory_ratio")}))


if __name__ == "__main__": main()
