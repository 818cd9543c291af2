"""peer-analyze routing and keys on a memory of 1,048,576 rows: seconds, and the largest resident memory beyond that of loading the model.

    PEER_NB_DATA=… python benchmarks/routing.py [OUTPUT.json] [PROBLEMS]

The table was never trained; what is measured does not depend on what is in it. Problems are GSM8K's first. Each command is a process of its
own, whose peak the system counts; one that only loads the checkpoint and the problems says what is not the analysis's. The load is noted.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch

from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM

LOAD = "import sys; from peer_nb.evaluation.loading import load_model; from peer_nb.analysis.routed_documents import read_documents; m, _ = load_model(sys.argv[1]); sum(p.sum() for p in m.parameters()); read_documents('gsm8k')"
COMMAND = "import sys; from peer_nb.analysis.command import main; sys.exit(main())"


def checkpoint(folder: Path) -> dict:
    "A model with one memory of a million rows; its sizes"
    torch.manual_seed(0)
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    peer = dict(num_experts=2**20, product_key_dim=[1024, 1024], num_heads=4, num_experts_per_tok=16, query_dim=32, query_norm="layer")
    attention = dict(q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
    model = PeerMLAForCausalLM(PeerMLAConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=len(tokenizer), max_position_embeddings=512,
                                             tie_word_embeddings=True, memory_layers=[1], memory_kind="pkm", peer_config=peer, mla_config=attention))
    for part in (model, tokenizer): part.save_pretrained(folder)
    return dict(rows=2**20, heads=4, rows_per_head=16, table_bytes=4 * 32 * 2**20)


def run(*words: str) -> dict:
    "Seconds of the processor, and the largest resident memory, of a process"
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", *words], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode: raise SystemExit(f"{words[1:]} ended with {process.returncode}")
    return dict(wall_seconds=time.perf_counter() - started, cpu_seconds=used.ru_utime + used.ru_stime, peak_bytes=used.ru_maxrss * 1024)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".json")
    problems = sys.argv[2] if len(sys.argv) > 2 else "100"
    with tempfile.TemporaryDirectory() as place:
        model = Path(place)/"model"
        about = checkpoint(model)
        result = dict(benchmark="routing", problems=int(problems), data="GSM8K, first of training", **about, threads=1, torch=torch.__version__, python=platform.python_version(),
                      cpu=platform.processor() or platform.machine(), load_average=os.getloadavg()[0], loading=run(LOAD, str(model)), commands={})
        for name in ("routing", "keys"):
            found = run(COMMAND, name, str(model), "gsm8k", "--limit", problems, "--output", str(Path(place)/name))
            said = json.loads((Path(place)/name/f"{name}.json").read_text())
            found |= dict(tokens=said["tokens"], beyond_loading_bytes=found["peak_bytes"] - result["loading"]["peak_bytes"])
            result["commands"][name] = found
            print(f"{name}: {found['tokens']:,} tokens, peak {found['peak_bytes']/1e6:,.0f} MB, {found['beyond_loading_bytes']/1e6:,.0f} MB beyond loading, {found['cpu_seconds']:.0f} s of the processor", flush=True)
            target.write_text(json.dumps(result, indent=1) + "\n")
