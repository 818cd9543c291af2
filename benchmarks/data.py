"""From files to batches: our data room against `datasets` with a plain packer, and the time a training waits for batches.

    python benchmarks/data.py                     prints all
    python benchmarks/data.py --json data.json    also writes every sample
    python benchmarks/data.py --reading --json data.json    only the reading, in place of what the file said of it

*Pipeline.* Both read the same JSON Lines files (Python's documentation and source, a few megabytes) with the same tokenizer,
first with empty caches, then a second time with what the first left there, and give one epoch of batches to a loop that only
counts. The peer is `load_dataset`, `map(batched=True)` to tokenise, `map(batched=True)` to concatenate and cut, and torch's
DataLoader; it may use the tokenizer's own threads or two processes, and the faster counts. Ours also hashes the text, shuffles
anew each epoch and can resume at any batch; nothing of that is left out. The peer's packer drops the rest of each thousand
documents, so its tokens are fewer by less than 0.2 %, which is checked. Rounds alternate; what counts is the wall clock,
since both use all processors.

*Reading.* The same paragraphs in each format, read row by row to their texts, ours and `datasets` streaming in blocks of a
thousand rows, in turn; processor time of the process, since that is what tokenising has to share. Both must give equally many
characters. `datasets` decides a type for each column; ours keeps what is written and checks each line.

*Waiting.* The small model of the demo is trained; what is counted is the time between asking for a batch and having it, as
a part of the whole step, after the first steps. A streamed set is tokenised while the model trains.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
LENGTH, BATCH, VOCABULARY = 256, 16, 2048


def machine() -> dict:
    "Processor and cores, without names of the host"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return dict(cpu=names[0] if names else platform.processor(), cores=len(os.sched_getaffinity(0)), system=platform.system())


def run_of(files: Path, **entry):
    "The configuration that both read by"
    from peer_nb.config import Config, DatasetConfig, DatasetEntry, TrainConfig
    data = DatasetConfig([DatasetEntry("text", str(files/"*.jsonl"), **entry)], str(files/"tokenizer"), max_seq_length=LENGTH, heldout_fraction=0.0)
    return Config(dataset_config=data, train_config=TrainConfig(per_device_train_batch_size=BATCH))


def ours(files: Path, cache: Path) -> int:
    "Read one epoch; its tokens"
    from peer_nb.data.corpora import load_tokenizer
    from peer_nb.data.packing import training_batches
    cfg = run_of(files)
    batches = training_batches(cfg, load_tokenizer(cfg.dataset_config))
    return sum(next(batches)["input_ids"].numel() for _ in range(batches.tokens_per_epoch//(BATCH*LENGTH)))


def theirs(files: Path, cache: Path, processes: int | None) -> int:
    "The same by `datasets` and a packer that concatenates"
    import datasets
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(files/"tokenizer")

    def tokenise(batch): return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(batch["text"], add_special_tokens=False, verbose=False).input_ids]}

    def pack(batch):
        flat = [i for ids in batch["input_ids"] for i in ids]
        rows = [flat[i:i + LENGTH] for i in range(0, len(flat) - LENGTH + 1, LENGTH)]
        return {"input_ids": rows, "labels": rows}

    text = datasets.load_dataset("json", data_files=str(files/"*.jsonl"), split="train", cache_dir=str(cache/"datasets"))
    tokens = text.map(tokenise, batched=True, num_proc=processes, remove_columns=text.column_names)
    rows = tokens.map(pack, batched=True, num_proc=processes, remove_columns=tokens.column_names)
    return sum(batch["input_ids"].numel() for batch in DataLoader(rows.with_format("torch"), batch_size=BATCH, shuffle=True))


WAYS = {"peer_nb": ours, "datasets, tokenizer's threads": lambda f, c: theirs(f, c, None), "datasets, 2 processes": lambda f, c: theirs(f, c, 2)}


def one(way: str, files: Path, cache: Path) -> dict:
    "In this process: imports are not counted, the rest is"
    import datasets, torch, transformers   # noqa: E401, F401
    import peer_nb.data.packing            # noqa: F401
    start = time.perf_counter()
    tokens = WAYS[way](files, cache)
    return dict(seconds=time.perf_counter() - start, tokens=tokens)


def write_files(folder: Path) -> dict:
    "The text that all read, and the tokenizer"
    from peer_nb.config import DatasetConfig, DatasetEntry
    from peer_nb.data.corpora import documents, load_tokenizer
    sizes, corpora = {}, [DatasetEntry("docs", "python:docs"), DatasetEntry("stdlib", "python:stdlib")]
    for entry in corpora:
        texts = [piece for text in documents(entry) for piece in text.split("\n\n") if piece.strip()]   # paragraphs: many short documents
        texts += list(documents(entry))                                                               # and whole files: a few long ones
        (folder/f"{entry.name}.jsonl").write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts))
        sizes[entry.name] = dict(documents=len(texts), bytes=sum(len(t.encode()) for t in texts))
    load_tokenizer(DatasetConfig(corpora[:1], f"corpus:bpe:{VOCABULARY}")).save_pretrained(folder/"tokenizer")
    return sizes


def pipeline(files: Path, rounds: int) -> list[dict]:
    "Every way in a process of its own, in turn, first and second time"
    samples = []
    for r in range(rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as cache:
                env = os.environ | dict(PEER_NB_CACHE=f"{cache}/ours", HF_HOME=f"{cache}/hf", HF_HUB_OFFLINE="1")
                env |= dict(TOKENIZERS_PARALLELISM="true" if "threads" in way else "false")
                for caches in ("empty", "filled"):
                    command = [sys.executable, __file__, "--one", way, "--files", str(files), "--cache", cache]
                    done = subprocess.run(command, env=env, capture_output=True, text=True)
                    if done.returncode: raise SystemExit(done.stderr)
                    samples.append(dict(round=r, way=way, caches=caches) | json.loads(done.stdout.splitlines()[-1]))
                    print("{way:32} {caches:7} {seconds:7.2f} s {tokens:9,} tokens".format(**samples[-1]), flush=True)
    return samples


FORMATS = {"jsonl": "json", "jsonl.gz": "json", "json": "json", "csv": "csv", "txt": "text", "parquet": "parquet"}   # ending: what `datasets` calls it


def write_formats(folder: Path) -> None:
    "The paragraphs of the documentation and the source, with a number and an address each, in every format"
    import csv, gzip
    import pyarrow as pa, pyarrow.parquet as pq
    from peer_nb.config import DatasetEntry
    from peer_nb.data.corpora import documents
    texts = [p for name in ("docs", "stdlib") for t in documents(DatasetEntry(name, f"python:{name}")) for p in t.split("\n\n") if p.strip()]*2
    rows = [dict(text=t, id=i, url=f"https://example.org/{i}") for i, t in enumerate(texts)]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    for ending, data in {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "json": json.dumps(rows).encode(), "txt": "\n\n".join(texts).encode()}.items(): (folder/f"x.{ending}").write_bytes(data)
    with open(folder/"x.csv", "w", newline="") as file: csv.writer(file).writerows([rows[0], *(r.values() for r in rows)])
    pq.write_table(pa.Table.from_pylist(rows), folder/"x.parquet")


def texts_of_ours(path: Path, kind: str):
    from peer_nb.config import DatasetEntry
    from peer_nb.data.corpora import texts_of
    return texts_of(DatasetEntry("x", str(path)))


def texts_of_theirs(path: Path, kind: str):
    import datasets
    options = dict(sample_by="paragraph") if kind == "text" else {}
    rows = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True, **options)
    return (text for batch in rows.iter(1000) for text in batch["text"])


def reading(rounds: int) -> dict:
    "Million characters per second of processor time, by format"
    readers, found = {"peer_nb": texts_of_ours, "datasets": texts_of_theirs}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_formats(Path(folder))
        for ending, kind in FORMATS.items():
            path, speeds, sizes = Path(folder)/f"x.{ending}", {name: [] for name in readers}, set()
            for _ in range(rounds):
                for name, texts in readers.items():
                    start = time.process_time()
                    size = sum(map(len, texts(path, kind)))
                    speeds[name].append(size/1e6/(time.process_time() - start))
                    sizes.add(size)
            if len(sizes) > 1: raise SystemExit(f"{ending}: the readers gave different texts: nothing to compare")
            speed = {name: round(statistics.median(s), 1) for name, s in speeds.items()}
            found[ending] = speed | dict(ratio=round(speed["peer_nb"]/speed["datasets"], 2))
            print(f"{ending:9}", found[ending], flush=True)
    return found


def compare(samples: list[dict]) -> dict:
    "Median tokens per second of each way, and ours over the best of the others"
    out = {}
    for caches in ("empty", "filled"):
        speed = {way: statistics.median(s["tokens"]/s["seconds"] for s in samples if (s["way"], s["caches"]) == (way, caches)) for way in WAYS}
        out[caches] = dict(tokens_per_second={way: round(v) for way, v in speed.items()}, ratio=round(speed.pop("peer_nb")/max(speed.values()), 2))
    return out


def waiting(files: Path, steps: int, first: int, streaming: bool, workers: int) -> dict:
    "Train the demo's model and time both the step and the wait in it"
    import torch
    from peer_nb.config import apply_overrides, load_config, to_dict
    from peer_nb.data.corpora import load_tokenizer
    from peer_nb.data.packing import training_batches
    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    from peer_nb.training.steps import accumulate_gradient
    from peer_nb.training.optim import build_optimizer
    base = load_config(ROOT/"configs"/"demo.yaml")
    data = replace(run_of(files, streaming=streaming).dataset_config, max_seq_length=base.dataset_config.max_seq_length)
    cfg = replace(base, dataset_config=data)
    batches = training_batches(cfg, load_tokenizer(data), num_workers=workers)
    torch.manual_seed(0)
    model = PeerMLAForCausalLM(PeerMLAConfig(**to_dict(cfg)["model_config"])).train()
    optimizer = build_optimizer(model, cfg.train_config)
    waits, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - start)
        accumulate_gradient(model, [batch], cfg.train_config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    share = sum(waits[first:])/sum(times[first:])
    result = dict(streaming=streaming, workers=workers, steps=steps - first, percent_waiting=round(100*share, 3), step_ms=round(1e3*statistics.median(times[first:]), 2),
                  longest_wait_ms=round(1e3*max(waits[first:]), 2), first_batch_ms=round(1e3*waits[0], 1))
    print("streaming {streaming}, {workers} workers: waiting {percent_waiting} % of {steps} steps of {step_ms} ms; the longest wait {longest_wait_ms} ms".format(**result), flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the pipelines")
    parser.add_argument("--steps", type=int, default=220, help="steps of training, of which the first 20 are not counted")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.add_argument("--reading", action="store_true", help="only the reading of each format")
    for name in ("--one", "--files", "--cache"): parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, Path(options.files), Path(options.cache))))
        return
    load = [os.getloadavg()[0]]
    read = reading(options.rounds)
    if options.reading:
        if options.json: options.json.write_text(json.dumps(json.loads(options.json.read_text()) | dict(reading=read), indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = write_files(files := Path(folder))
        samples = pipeline(files, options.rounds)
        most = samples[0]["tokens"]
        if any(not .998*most < s["tokens"] <= most for s in samples): raise SystemExit("the ways gave different numbers of tokens: nothing to compare")
        ratios = compare(samples)
        print(json.dumps(ratios, indent=1))
        waits = [waiting(files, options.steps, 20, streaming, workers) for streaming in (False, True) for workers in (0, 2)]
    if options.json:
        import datasets, tokenizers, torch, transformers
        about = dict(machine=machine(), python=platform.python_version(), clock="wall clock", vocabulary=VOCABULARY, max_seq_length=LENGTH, batch_size=BATCH, files=sizes,
                     load_average_before_and_after=[*load, os.getloadavg()[0]], threads=torch.get_num_threads()) | {m.__name__: m.__version__ for m in (datasets, tokenizers, torch, transformers)}
        options.json.write_text(json.dumps(about | dict(reading=read, pipeline=ratios, waiting=waits, samples=samples), indent=1) + "\n")


if __name__ == "__main__": main()
