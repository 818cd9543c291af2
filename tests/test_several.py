"A study whose runs are several processes each: the same numbers, one result, and any of the processes may die."
import json
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fake_studies import ended, launch, until
from peer_nb.study.plan import load_plan
from peer_nb.study.run import Run, process_mark
from peer_nb.files import read_json, read_jsonl
from peer_nb.models.causal_lm import PeerMLAForCausalLM

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
TINY = {"model_config.hidden_size": 32, "model_config.num_hidden_layers": 2, "model_config.num_attention_heads": 2, "model_config.intermediate_size": 64, "model_config.peer_start_layer": 1,
        "model_config.peer_config.num_experts": 64, "model_config.peer_config.product_key_dim": [8, 8], "model_config.peer_config.num_heads": 2, "model_config.peer_config.num_experts_per_tok": 4,
        "model_config.peer_config.query_dim": 16, "model_config.peer_config.log_freq": 2, "model_config.mla_config.q_lora_rank": 32, "model_config.mla_config.kv_lora_rank": 16,
        "model_config.mla_config.qk_nope_head_dim": 8, "model_config.mla_config.qk_rope_head_dim": 8, "model_config.mla_config.v_head_dim": 16, "dataset_config.tokenizer_name": "bytes",
        "dataset_config.max_seq_length": 32, "eval_config.max_tokens": 600, "eval_config.evals": [], "train_config.logging_steps": 1}


def study(folder: Path, steps: int, seeds: list[int], rows: int = 2, **more) -> list[str]:
    "The words that start configs/config.yaml, made tiny and local, and otherwise as it is"
    folder.mkdir(exist_ok=True)
    pairs = [f"{a} plus {b} is {a + b}." for a in range(30) for b in range(30)]
    (folder/"sums.jsonl").write_text("\n".join(json.dumps({"text": " ".join(pairs[i::90])}) for i in range(90)))
    (folder/"study.yaml").write_text(yaml.safe_dump(dict(name="several", base_config=str(ROOT/"configs"/"config.yaml"), axes={"heads": {"two": {}}}, seeds=seeds)))
    sets = [dict(name=name, path=str(folder/"sums.jsonl"), weight=weight) for name, weight in (("sums", 0.7), ("again", 0.3))]
    keys = TINY | {"dataset_config.datasets": sets, "train_config.max_steps": steps, "train_config.num_train_epochs": None, "train_config.per_device_train_batch_size": rows,
                   "train_config.learning_rate": 0.01} | {k.replace("__", "."): v for k, v in more.items()}
    return ["--study", folder/"study.yaml", *(f"{k}={json.dumps(v)}" for k, v in keys.items())]


def run_study(out: Path, words: list, *more, **environment) -> Path:
    "The folder of a study that was run to its end"
    code, said = ended(launch(*words, "--output-dir", out, *more, WANDB_MODE="offline", **environment), 900)
    assert code == 0, said
    return next(out.iterdir())


def rank_of(run: Path, number: int) -> int | None: # its process id, if it is alive
    "A rank of a run, found by its environment"
    for process in Path("/proc").glob("[0-9]*"):
        try: words = (process/"environ").read_bytes().split(b"\0"); command = (process/"cmdline").read_bytes()
        except OSError: continue
        if b"as_rank" in command and f"RANK={number}".encode() in words and str(run).encode() in config_of(command): return int(process.name)


def config_of(command: bytes) -> bytes: # the file that a rank was told to read
    words = command.split(b"\0")
    try: return Path(words[words.index(b"--config") + 1].decode()).read_bytes()
    except (ValueError, OSError): return b""


def at_step(run: Path, step: int) -> bool:
    return ((read_json(run/"heartbeat.json") or {}).get("step") or 0) >= step


@pytest.mark.parametrize("ranks,kind", [(4, "fsdp2"), (2, "ddp")])
def test_the_guides_configuration_with_several_processes(ranks, kind, tmp_path):
    "fp16, accumulation, batch-normalised queries, expert usage and wandb as configs/config.yaml has them: the numbers of one process, and one result"
    save = dict(train_config__save_steps=4, train_config__eval_steps=3)
    alone = run_study(tmp_path/"one", study(tmp_path/"a", 6, [42], 2*ranks, **save), "--processes", 1)
    several = run_study(tmp_path/"several", study(tmp_path/"a", 6, [42], **save, train_config__parallel=kind), "--processes", ranks)
    plans = [load_plan(f) for f in (alone, several)]
    assert [p.world_size for p in plans] == [1, ranks] and plans[0].cells[0].identity != plans[1].cells[0].identity
    run, other = (f/"runs"/p.cells[0].id for f, p in zip((several, alone), plans))
    mine, theirs = (read_json(r/"result.json") for r in (run, other))
    assert mine["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4) and mine["training"]["tokens"] == theirs["training"]["tokens"]
    lines, expected = (read_jsonl(r/"metrics.jsonl") for r in (run, other))
    assert [l["step"] for l in lines] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(lines, expected): assert a["loss"] == pytest.approx(b["loss"], abs=1e-4) and [*a] == [*b]
    assert [u["step"] for u in read_jsonl(run/"usage.jsonl")] == [2, 4, 6] and 0 < mine["usage"]["used"] <= 1
    assert len([*(run/"wandb").glob("offline-run-*")]) == 1
    checkpoint = run/"checkpoint-6"
    assert read_json(checkpoint/"trainer_state"/"about.json")["world_size"] == ranks
    assert PeerMLAForCausalLM.from_pretrained(checkpoint).num_parameters() == PeerMLAForCausalLM.from_pretrained(other/"checkpoint-6").num_parameters() == mine["parameters"]["total"]


def test_a_rank_a_wrapper_and_a_signal(tmp_path):
    "kill -9 of a rank: FAILED; of the wrapper: STALE, and no rank trains on; SIGTERM: saved, and taken up by the runner; in the end all are the undisturbed runs to the bit"
    keys = dict(train_config__save_steps=10, train_config__eval_steps=100, train_config__save_total_limit=1, train_config__parallel="fsdp2", wandb_config=None)
    whole = run_study(tmp_path/"whole", study(tmp_path/"a", 40, [1, 2, 3], **keys), "--processes", 2, "--parallel", 1)
    out = tmp_path/"out"
    process = launch(*study(tmp_path/"a", 40, [1, 2, 3], **keys), "--output-dir", out, "--processes", 2, "--parallel", 1, "--fresh")   # not the runs of the whole study
    folder = until(lambda: [*out.glob("*/plan.json")], 120)[0].parent
    asked, rank, wrapper = (folder/"runs"/c.id for c in load_plan(folder).cells)
    until(lambda: at_step(asked, 12), 300)
    os.kill(read_json(asked/"status.json")["pid"], signal.SIGTERM)
    until(lambda: at_step(rank, 12), 300)
    os.kill(rank_of(rank, 1), signal.SIGKILL)
    until(lambda: at_step(wrapper, 12), 300)
    ranks = [rank_of(wrapper, n) for n in (0, 1)]
    os.kill(read_json(wrapper/"status.json")["pid"], signal.SIGKILL)
    until(lambda: not any(map(process_mark, ranks)), 60)
    code, said = ended(process, 600)
    assert code == 1 and [Run(r).state for r in (asked, rank, wrapper)] == ["DONE", "FAILED", "STALE"], said
    assert "stopped by SIGTERM; it has saved, and goes on (1 of 3 times)" in said and read_json(asked/"status.json")["attempt"] == 2
    error = read_json(rank/"status.json")["error"]
    assert error["kind"] == "killed" and "rank 1 of 2 was ended by SIGKILL" in error["message"]
    code, said = ended(launch("--resume", "--retry-failed", "--output-dir", out), 600)
    assert code == 0 and "2 of 3 runs to do" in said and "of 2 processes" in said, said
    tables = [pd.read_csv(f/"ablation_results.csv") for f in (whole, folder)]
    numbers = [c for c in tables[0] if "/" in c] + ["run", "state", "tokens"]
    pd.testing.assert_frame_equal(*(t[numbers] for t in tables), check_exact=True)
    code, said = ended(launch("--resume", "--rerun", 1, "--processes", 3, "--output-dir", out))
    assert code == 2 and "its runs have 2 processes each, and with these options they would have 3" in said, said
