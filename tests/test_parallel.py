"Several processes are one run: its losses, its files, its end."
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from peer_nb.config import Config, DatasetConfig, DatasetEntry, EvalConfig, MLAConfig, ModelConfig, PeerConfig, TrainConfig, UserError, apply_overrides, save_config
from peer_nb.files import read_json, read_jsonl
from peer_nb.training.checkpoints import latest_checkpoint, load_checkpoint
from peer_nb.training.launch import launch, train_in_processes
from peer_nb.training.loop import main, train

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text")/"sums.jsonl"
    pairs = [f"{a} plus {b} is {a + b}." for a in range(30) for b in range(30)]
    file.write_text("\n".join(json.dumps({"text": " ".join(pairs[i::90])}) for i in range(90)))
    return file


def config(text: Path, out: Path, rows: int = 2, dropout: float = 0.0, **train) -> Config:
    "Batch-normalised queries, accumulation, clipping that is active, a tied head, an odd number of sub-keys"
    keys = dict(output_dir=str(out), per_device_train_batch_size=rows, gradient_accumulation_steps=2, learning_rate=1e-2, max_steps=STEPS,
                logging_steps=1, save_steps=3, eval_steps=STEPS, log_level="error", max_grad_norm=0.3) | train
    peer = PeerConfig(num_experts=63, product_key_dim=[9, 7], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="batch")
    model = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=259,
                        max_position_embeddings=64, peer_start_layer=1, peer_config=peer, tie_word_embeddings=True, dropout=dropout,
                        mla_config=MLAConfig(None, 16, 8, 16, 8))
    sources = [DatasetEntry("sums", str(text), weight=0.7), DatasetEntry("again", str(text), weight=0.3)]
    return Config(model, TrainConfig(**keys), DatasetConfig(sources, "bytes", max_seq_length=32, heldout_fraction=0.1),
                  EvalConfig(datasets=sources[:1], eval_batch_size=16, max_tokens=500))


def timeless(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in read_jsonl(out/"metrics.jsonl")]


class Watched(threading.Thread):
    "`peer-train` of several ranks in a process of its own, to be sent signals"
    def __init__(self, cfg: Config, folder: Path, *words: str, patch: str = ""):
        save_config(cfg, folder/"run.yaml")
        code = f"{patch}\nfrom peer_nb.training.loop import main; raise SystemExit(main())"
        self.process = subprocess.Popen([sys.executable, "-c", code, "--config", str(folder/"run.yaml"), "--processes", "2", *words],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "In this process, and in those that it starts"
    before, wanted = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(before)
    if wanted is None: del os.environ["OMP_NUM_THREADS"]
    else: os.environ["OMP_NUM_THREADS"] = wanted


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    "One process that reads what two read"
    out = tmp_path_factory.mktemp("alone")/"run"
    train(config(text, out, rows=4))
    return out
