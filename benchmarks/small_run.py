"""configs/small.yaml on Python's own documentation, against compressors: bits per byte over process CPU time.

    python benchmarks/small_run.py            # a quarter of an hour on one idle core; writes benchmarks/small_run.json

CPU time of the whole process, with tokenising, evaluating and saving; it does not depend on who else uses the machine as
wall time does. gzip and xz see the held-out documents only, as one text; "xz that has read the training text" is what the
held-out text adds to it."""
import argparse
import gzip
import json
import lzma
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]


def compressed(text, before=b""):
    "Bytes of xz -9e for a text behind another"
    size = lambda data: len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))
    return size(before + text) - (size(before) if before else 0)


def baselines(cfg):
    "Bits per byte of the held-out documents under compressors"
    from peer_nb.data.corpora import documents
    entry, fraction = cfg.dataset_config.datasets[0], cfg.dataset_config.heldout_fraction
    held, train = ("\n\n".join(documents(entry, heldout, fraction)).encode() for heldout in (True, False))
    sizes = {"gzip -9": len(gzip.compress(held, 9)), "xz -9e": compressed(held), "xz that has read the training text": compressed(held, train)}
    return dict(heldout_bytes=len(held), training_bytes=len(train), bits_per_byte={name: round(8*size/len(held), 4) for name, size in sizes.items()})


def report(cfg, lines, threads):
    "What the page draws"
    scored = [dict(step=line["step"], tokens=line["tokens"], cpu_seconds=round(line["cpu"], 1), bits_per_byte=round(line["eval/docs/bits_per_byte"], 4))
              for line in lines if "eval/docs/bits_per_byte" in line]
    return dict(config="configs/small.yaml", threads=threads, clock="process CPU time; the machine was shared", evaluations=scored, **baselines(cfg))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(Path(__file__).with_suffix(".json")))
    options = parser.parse_args()
    import torch
    from peer_nb.config import apply_overrides, load_config
    from peer_nb.training.loop import train
    from peer_nb.training.tracking import Tracker
    cfg = apply_overrides(load_config(ROOT/"configs"/"small.yaml"), {"train_config.output_dir": tempfile.mkdtemp()})
    lines, write = [], Tracker.metrics
    Tracker.metrics = lambda self, line: (lines.append(line | dict(cpu=time.process_time())), write(self, line))
    train(cfg, progress=False)
    Path(options.output).write_text(json.dumps(report(cfg, lines, torch.get_num_threads()), indent=1) + "\n")


if __name__ == "__main__": main()
