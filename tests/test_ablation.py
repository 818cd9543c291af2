"A study from the command line to its page, with a template that takes no time; killed, continued, refused."
import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from peer_nb.running import local as launching
from peer_nb.running import command as runner
from peer_nb.findings.study_page import write_report
from peer_nb.findings.results import load_runs, metric_columns
from peer_nb.study.run import Run
from peer_nb.study.plan import load_plan, make_plan, matching
from peer_nb.findings.effects import effects_table
from peer_nb.study.study import builtin_axes, load_study
from peer_nb.config import DataMix, load_config, load_data_mixes
from peer_nb.evaluation.items import write_hub_shape
from peer_nb.files import read_json, read_jsonl
from peer_nb.tasks.registry import TASKS

ROOT = Path(__file__).parent.parent
EVIL = "<script>alert(1)</script>"
COMMAND = [sys.executable, "-c", "import sys; from peer_nb.running.command import main; sys.exit(main())"]

TEMPLATE = ['''
config_path: str = ""
run_dir: str = ""
levels: dict = {}
overrides: dict = {}
resume: bool = False
''', '''
from peer_nb.files import append_jsonl, die_with_parent, write_json
die_with_parent()
import os, time
from pathlib import Path
from peer_nb.config import apply_overrides, load_config
run, config = Path(run_dir), apply_overrides(load_config(config_path), overrides)
''', '''
start = len((run/"metrics.jsonl").read_text().splitlines()) if resume and (run/"metrics.jsonl").exists() else 0
for step in range(start, 10):
    append_jsonl(run/"metrics.jsonl", dict(step=step + 1, tokens=64*(step + 1), loss=4 - step/10))
    write_json(run/"heartbeat.json", dict(step=step + 1, total_steps=10, tokens=64*step, loss=4 - step/10, tokens_per_second=100.0))
    time.sleep(float(os.environ.get("FAKE_STEP", "0")))
''', '''
if levels.get("rate") == "high" and levels.get("heads") == "two" and not os.environ.get("FAKE_MENDED"):
    raise ValueError("<img src=x onerror=alert(2)>, on purpose\\nsecond line")
''', '''
peer, rate = config.model_config.peer_config, config.train_config.learning_rate
value = 3 - 0.1*peer.num_heads - 10*rate + config.train_config.seed/1000
write_json(run/"result.json", dict(schema=1, metrics={"words/bits_per_byte": value, "words/loss": 2*value}, parameters=dict(total=1000 + peer.num_heads, active=10*peer.num_heads),
           training=dict(tokens=640, seconds=1.5, tokens_per_second=426.7, peak_memory_bytes=12345), data=dict(words=dict(documents=1)), environment=dict(python="3", torch="2", device="cpu", threads=1)))
''']

BASE = dict(
    model_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=512, max_position_embeddings=64, peer_start_layer=0,
                      peer_config=dict(num_experts=64, product_key_dim=[8, 8], num_heads=4, num_experts_per_tok=4, query_dim=16),
                      mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)),
    train_config=dict(max_tokens=640, learning_rate=0.01, per_device_train_batch_size=1, gradient_accumulation_steps=1),
    dataset_config=dict(datasets=[dict(name="words", path="words.txt", format="text")], tokenizer_name="bytes", max_seq_length=64))

STUDY = dict(name="tiny", base_config="base.yaml", notebook="template.ipynb", seeds=[42],
             axes={"heads": {EVIL: {}, "two": {"model_config.peer_config.num_heads": 2}}, "rate": {"low": {}, "high": {"train_config.learning_rate": 0.02}}})


def write_study(folder: Path, study: dict = STUDY, base: dict = BASE, template: list[str] = TEMPLATE) -> Path:
    "A folder with template, text, base and study"
    folder.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in template]
    if cells: cells[0].metadata.tags = ["parameters"]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder/"template.ipynb")
    (folder/"words.txt").write_text("".join(f"line {n} of a few plain words\n" for n in range(200)))
    base = json.loads(json.dumps(base).replace("words.txt", str(folder/"words.txt")))
    (folder/"base.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    (folder/"study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return folder


def call(capsys, *words) -> tuple[int, str, str]:
    "The command in this process"
    capsys.readouterr()
    code = runner.main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def launch(*words, **environment) -> subprocess.Popen:
    "The command in its own process"
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finished(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A study of four runs, one of which fails on purpose; its folder and what the command said"
    work = write_study(tmp_path_factory.mktemp("tiny"))
    said = finished(launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0))
    folder, = (work/"out").iterdir()
    return work, folder, said


def statuses(folder: Path) -> dict[str, dict]:
    return {p.parent.name: read_json(p) for p in folder.glob("runs/*/status.json")}


def test_a_failing_run_is_a_row_and_the_study_goes_on(tiny):
    work, folder, (code, out, err) = tiny
    assert code == 1, out + err
    found = statuses(folder)
    assert [s["state"] for _, s in sorted(found.items())] == ["DONE", "DONE", "DONE", "FAILED"]
    failed, = (k for k, s in found.items() if s["state"] == "FAILED")
    assert found[failed]["error"] == {"class": "ValueError", "kind": "code", "message": "<img src=x onerror=alert(2)>, on purpose\nsecond line"}
    kept = {p.name for p in (folder/"runs"/failed).iterdir()}
    assert {"config.yaml", "notebook.ipynb", "report.html", "log.txt", "status.json", "metrics.jsonl"} <= kept and "result.json" not in kept
    assert "3 of 4 runs done, 1 FAILED" in out and f"page: {folder/'index.html'}" in out and "One seed: anecdotal" in out
    assert re.search(r"best words/bits_per_byte: \d", out) and "FAILED 004" in out


def test_the_folder_has_what_the_contract_says(tiny):
    _, folder, _ = tiny
    assert {"study.yaml", "plan.json", "ablation_results.csv", "visualizations", "index.html", "runs", "plotly.min.js"} <= {p.name for p in folder.iterdir()}
    plan = load_plan(folder)
    assert sorted(p.name for p in (folder/"runs").iterdir()) == [c.id for c in plan.cells]
    for cell in plan.cells:
        config = load_config(folder/"runs"/cell.id/"config.yaml")
        assert config.train_config.output_dir == str(folder/"runs"/cell.id)
        assert config.train_config.learning_rate == (0.02 if cell.levels["rate"] == "high" else 0.01)
        assert config.model_config.peer_config.num_heads == (2 if cell.levels["heads"] == "two" else 4)
    assert {p.suffix for p in (folder/"visualizations").iterdir()} == {".html", ".png", ".svg"}


def test_the_table_is_what_the_run_folders_say(tiny):
    "Read again by hand, with nothing of the package"
    _, folder, _ = tiny
    rows = {r["run"]: r for r in csv.DictReader((folder/"ablation_results.csv").open(newline=""))}
    assert len(rows) == 4
    for run in (folder/"runs").iterdir():
        row, status = rows[run.name], json.loads((run/"status.json").read_text())
        assert row["state"] == status["state"] and float(row["run_seconds"]) == status["seconds"] and row["seed"] == "42"
        if status["state"] == "FAILED":
            assert (row["error_class"], row["error"]) == (status["error"]["class"], status["error"]["message"]) and row["words/loss"] == ""
            continue
        result = json.loads((run/"result.json").read_text())
        assert {k: float(row[k]) for k in result["metrics"]} == result["metrics"]
        assert (float(row["tokens"]), float(row["seconds"]), float(row["peak_memory_bytes"])) == (640, 1.5, 12345)
        assert (int(row["parameters"]), int(row["active_parameters"]), row["env_device"]) == (result["parameters"]["total"], result["parameters"]["active"], "cpu")


def test_no_word_of_a_level_or_an_error_becomes_html(tiny):
    _, folder, _ = tiny
    pages = [folder/"index.html", *folder.glob("runs/*/report.html"), *folder.glob("visualizations/*.html")]
    assert len(pages) >= 1 + 4 + 3
    for page in pages:
        text = page.read_text()
        assert EVIL not in text and "<img src=x" not in text, page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages[0].read_text() and "&lt;img src=x onerror=alert(2)&gt;" in pages[0].read_text()


def test_no_page_asks_for_anything_outside_its_folder(tiny):
    _, folder, _ = tiny
    for page in [folder/"index.html", *folder.glob("runs/*/report.html"), *folder.glob("visualizations/*.html")]:
        wanted = re.findall(r"""(?:src|href)=["']([^"']+)""", page.read_text())
        assert not [w for w in wanted if re.match(r"(?:https?:)?//", w)], page
        for link in (w for w in wanted if not w.startswith(("#", "data:"))): assert (page.parent/link).exists(), f"{page}: {link}"


def test_continuing_repeats_nothing_and_retries_on_request(tiny, tmp_path, capsys, monkeypatch):
    work, folder, _ = tiny
    folder = shutil.copytree(work/"out", tmp_path/"out")/folder.name   # others look at the failed run as well
    before = statuses(folder)
    code, out, err = call(capsys, "--resume", "--output-dir", tmp_path/"out")
    assert code == 1 and "0 of 4 runs to do" in out and statuses(folder) == before, out + err
    monkeypatch.setenv("FAKE_MENDED", "1")
    code, out, err = call(capsys, "--resume", "--retry-failed", "--study", work/"study.yaml", "--output-dir", tmp_path/"out")
    assert code == 0 and "4 of 4 runs done" in out, out + err
    after = statuses(folder)
    assert [k for k in before if before[k] != after[k]] == [k for k in before if before[k]["state"] == "FAILED"]
    assert pd.read_csv(folder/"ablation_results.csv").state.tolist() == ["DONE"]*4
    assert len(list((tmp_path/"out").iterdir())) == 1


def test_another_study_is_refused_with_the_difference(tiny, capsys):
    work, folder, _ = tiny
    before = statuses(folder)
    other = write_study(work/"other", {**STUDY, "axes": {"heads": STUDY["axes"]["heads"]}})
    for words, said in [(["--study", other/"study.yaml"], "axis rate: the study has low {}; high"), (["--study", work/"study.yaml", "--tokens", 128], "tokens: None in the study; asked for 128"),
                        (["--study", work/"study.yaml", "train_config.learning_rate=0.5"], "base: train_config.learning_rate is 0.01 in the study; asked for 0.5"),
                        (["--base-config", work/"base.yaml", "--axes", "selection_heads", "--notebook", work/"template.ipynb"], "axis heads: the study has")]:
        code, out, err = call(capsys, "--resume", "--output-dir", work/"out", *words)
        assert code == 2 and "cannot be continued" in err and said in err and err.count("\n") == 1, err
    assert statuses(folder) == before and len(list((work/"out").iterdir())) == 1


def test_other_code_or_text_is_refused_only_while_runs_are_left(tmp_path, capsys):
    work = write_study(tmp_path)
    request = runner.read_request(None, work/"study.yaml", None, None, None, None, [])
    folder = runner.make_folder(work/"out", make_plan(request.study, request.base), "cpu")
    (work/"words.txt").write_text("".join(f"line {n} of other words\n\n" for n in range(200)))
    code, _, err = call(capsys, "--resume", "--output-dir", work/"out")
    assert code == 2 and "text or tokenizer of 4 runs changed" in err
    write_study(work, template=[*TEMPLATE, "1 + 1"])
    code, _, err = call(capsys, "--resume", "--output-dir", work/"out")
    assert code == 2 and "the template's code changed" in err
    assert not statuses(folder)


def test_two_runners_on_one_folder(tmp_path, capsys):
    work = write_study(tmp_path)
    request = runner.read_request(None, work/"study.yaml", None, None, None, None, [])
    folder = runner.make_folder(work/"out", make_plan(request.study, request.base), "cpu")
    holder = subprocess.Popen([sys.executable, "-c", "import sys; from peer_nb.files import folder_lock\nwith folder_lock(sys.argv[1]): print(flush=True); input()", str(folder)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    holder.stdout.readline()
    code, _, err = call(capsys, "--resume", "--output-dir", work/"out")
    holder.communicate("\n")
    assert code == 2 and f"in use by process {holder.pid}" in err and not statuses(folder)


def until(what, seconds: float = 600):
    "Wait for something to be true"
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value


@pytest.mark.slow
def test_interrupted_and_killed_half_way_then_continued(tmp_path):
    "In the second run Ctrl-C, then kill -9 of its process, then of the runner, then to the end: the first is run once, nothing trains on, the table is whole"
    work = write_study(tmp_path, {**STUDY, "axes": {"heads": STUDY["axes"]["heads"]}})
    out = work/"out"
    under_way = lambda: [p.parent for p in out.glob("*/runs/002*/heartbeat.json") if read_json(p)["step"] >= 2]
    first = launch("--study", work/"study.yaml", "--output-dir", out, "--parallel", 1, FAKE_STEP="0.15")
    run, = until(under_way)
    first.send_signal(signal.SIGINT)
    code, _, err = finished(first)
    assert code == 130 and f"peer-ablate --resume --output-dir {out}" in err
    until(lambda: Run(run).state == "PREEMPTED")
    folder = run.parent.parent
    done = statuses(folder)[next(c.id for c in load_plan(folder).cells)]
    step = lambda: read_json(run/"heartbeat.json")["step"]
    for victim in ("run", "runner"):
        before = step()
        process = launch("--resume", "--output-dir", out, FAKE_STEP="0.6")
        until(lambda: step() > before)
        os.kill(process.pid if victim == "runner" else read_json(run/"status.json")["pid"], signal.SIGKILL)
        code, said, _ = finished(process)
        if victim == "run": assert code == 1 and "STALE after" in said and "1 of 2 runs done, 1 STALE" in said
        until(lambda: Run(run).state == "STALE")
    size = (run/"metrics.jsonl").stat().st_size
    time.sleep(0.8)
    assert (run/"metrics.jsonl").stat().st_size == size, "a run trains on"
    code, said, err = finished(launch("--resume", "--output-dir", out, "--parallel", 1))
    assert code == 0 and "1 of 2 runs to do" in said and f"resumed {run.name}" in said, said + err
    assert [json.loads(l)["step"] for l in (run/"metrics.jsonl").read_text().splitlines()] == list(range(1, 11))
    assert statuses(folder)[load_plan(folder).cells[0].id] == done
    table = pd.read_csv(folder/"ablation_results.csv")
    assert table.state.tolist() == ["DONE", "DONE"] and np.allclose(table["words/bits_per_byte"], [3 - 0.4 - 0.1 + 0.042, 3 - 0.2 - 0.1 + 0.042])


def study_with(**changes) -> dict: return {**STUDY, **changes}


HEADS = STUDY["axes"]["heads"]
BAD_STUDIES = [
    (study_with(axes={"heads": {"a": {}, "b": {1: 2}}}), "axes.heads.b.1: 1 is no name of a key"), (study_with(axes={"heads": {"a": {}, "b": {None: 2}}}), "line 10: axes.heads.b.None: None is no name"),
    (study_with(reuse_from=["~nosuchuser/runs"]), "'~nosuchuser/runs'"), (study_with(axes={None: HEADS}), "axes.None"),
    (study_with(desing="full"), "unknown key; did you mean design?"),
    (study_with(base_config="missing.yaml"), "missing.yaml: cannot be read"),
    (study_with(axes={"heads": {**HEADS, "odd": {"model_config.peer_config.num_head": 3}}}), "axis 'heads', level 'odd'"),
    (study_with(axes={"heads": {**HEADS, "again": {"model_config.peer_config.num_heads": 2}}}), "the same configuration as level 'two'"),
    (study_with(axes={"heads": HEADS, "same": {"a": {"model_config.peer_config.num_heads": 8}, "b": {}}}), "both set model_config.peer_config.num_heads"),
    (study_with(axes={"heads": {}}), "axes.heads: has no levels"), (study_with(axes={}), "axes: is missing"),
    (study_with(budget={"tokens": 0}), "budget.tokens: 0 is not allowed"), (study_with(seeds=[1, 1]), "duplicates"),
    (study_with(primary={"metric": "docs/bits_per_byte"}), "primary.metric 'docs/bits_per_byte' will not be measured"),
    (study_with(notebook="nowhere.ipynb"), "no such template"),
    (study_with(axes={"mix": {"a": {}, "b": {"dataset_config.datasets": [dict(name="words", path="elsewhere.txt")]}}}), "dataset 'words' means two different sources"),
    (study_with(axes={"heads": {"wrong": {"model_config.peer_config.num_heads": -1}}}), "axis 'heads', level 'wrong'")]


@pytest.mark.parametrize("study, said", BAD_STUDIES)
def test_a_bad_study_costs_one_line_and_no_file(study, said, tmp_path, capsys):
    work = write_study(tmp_path, study)
    before = sorted(work.rglob("*"))
    code, out, err = call(capsys, "--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0)
    assert code == 2 and said in err and err.count("\n") == 1 and out == "", err
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("words, said", [
    (["--base-config", "no.yaml"], "no.yaml: cannot be read"), (["--base-config", "base.yaml", "--axes", "expert_setups"], "unknown axis 'expert_setups'; did you mean 'expert_setup'?"),
    (["--base-config", "base.yaml", "train_config.learning_rat=1"], "learning_rat"), (["--study", "study.yaml", "--custom-datasets", "no.yaml"], "--custom-datasets belongs to --base-config"),
    (["--base-config", "base.yaml", "--custom-datasets", "no.yaml"], "no.yaml: cannot be read"), (["--study", "study.yaml", "--tokens", "0"], "--tokens 0"), (["--study", "study.yaml", "--parallel", "0"], "--parallel 0"),
    (["--study", "study.yaml", "--output-dir", "words.txt/out"], "words.txt/out"), (["--resume"], "there is no study in"), ([], "give --base-config or --study"), (["--outputdir", "x"], "did you mean --output-dir?")])
def test_a_bad_command_costs_one_line_and_no_file(words, said, tmp_path, capsys, monkeypatch):
    work = write_study(tmp_path)
    monkeypatch.chdir(work)
    before = sorted(work.rglob("*"))
    code, out, err = call(capsys, *words)
    assert code == 2 and said in err and err.count("\n") == 1 and out == "", err
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("template, said", [([], "no code cell is tagged `parameters`"), (["run_dir: str = ''"], "the parameters cell lacks config_path, levels, overrides, resume")])
def test_a_template_that_cannot_be_told_what_to_run(template, said, tmp_path, capsys):
    work = write_study(tmp_path, template=template)
    code, _, err = call(capsys, "--study", work/"study.yaml", "--output-dir", work/"out")
    assert code == 2 and said in err and not (work/"out").exists()


@pytest.mark.parametrize("devices, words, said", [(2, [], "--gpus 4: this machine has 2 CUDA devices"), (6, ["--parallel", 2], "--parallel 2: needs 8 GPUs, 4 for each run"), (2, ["--gpus", 1, "--parallel", 3], "--parallel 3: needs 3 GPUs")])
def test_more_gpus_than_there_are(devices, words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launching, "gpu_devices", lambda: list(map(str, range(devices))))
    work = write_study(tmp_path)
    code, _, err = call(capsys, "--study", work/"study.yaml", "--output-dir", work/"out", *words)
    assert code == 2 and said in err and not (work/"out").exists()


def test_builtin_axes_of_the_demo_by_hand():
    base = load_config(ROOT/"configs"/"demo.yaml")
    axes, left_out = builtin_axes(base, mixes={"more": DataMix(base.dataset_config.datasets[:1], "docs twice")})
    key = "model_config.peer_config."
    assert axes["expert_setup"] == {"128×128": {}, "64×64": {key + "product_key_dim": [64, 64], key + "num_experts": 4096},
                                    "64×64, 4 neurons": {key + "product_key_dim": [64, 64], key + "num_experts": 4096, key + "expert_hidden_size": 4}}
    assert axes["selection_heads"] == {"4 heads × 8": {}, "2 heads × 16": {key + "num_heads": 2, key + "num_experts_per_tok": 16}, "8 heads × 4": {key + "num_heads": 8, key + "num_experts_per_tok": 4}}
    assert list(axes["data_mix"]) == ["base", "docs twice"] and left_out == {}


def test_the_demo_study_is_what_it_says():
    "8 combinations, each twice, with 8 seeds in blocks, one tokenizer, the same held-out sets and facts; four heads mean four times the active experts"
    study = load_study(ROOT/"configs"/"demo_study.yaml")
    plan = make_plan(study, load_config(study.base_config), fingerprint=lambda config: "text")
    configs = [plan.config(c) for c in plan.cells]
    assert len(configs) == 16 and len({c.identity for c in plan.cells}) == 16 and {c.seed for c in plan.cells} == {*range(42, 50)}
    assert {tuple(e.path for e in c.dataset_config.tokenizer_corpus) for c in configs} == {("python:docs",)}
    assert {tuple(e.path for e in c.eval_config.datasets) for c in configs} == {("python:docs", "python:stdlib")}
    facts = {(e.task, e.task_arguments, e.mask, e.weight) for c in configs for e in c.dataset_config.datasets if e.name == "facts"}
    assert len(facts) == 1 and all(sum(e.weight for e in c.dataset_config.datasets) == 1 for c in configs)
    mixes = load_data_mixes(ROOT/"configs"/"demo_datasets.yaml")["docs_and_source"].datasets   # the study file's second level, word for word
    assert [e for c in configs if len(c.dataset_config.datasets) == 3 for e in c.dataset_config.datasets][:3] == mixes
    match = {(m.axis, m.quantity): m for m in matching(plan)}
    assert match["selection_heads", "active experts per token"].mismatch == 3.0 and match["all cells", "tokens"].matched


@pytest.mark.parametrize("task", TASKS)
def test_a_study_of_every_memory_task(task):
    path = ROOT/"configs"/"memory"/"studies"/f"{task}.yaml"
    study = load_study(path)
    plan = make_plan(study, load_config(study.base_config), fingerprint=lambda config: "text")
    assert len(plan.cells) == 9 and {len(study.seeds), len(plan.axes["feed_forward"])} == {3}
    assert plan.metric.startswith(task + "/") and plan.metric.endswith("/exact_match") and plan.direction == "maximize"
    assert [c.parameters["memory_tables"] > 0 for c in plan.cells[::3]] == [False, True, True]


def test_a_template_s_result_is_what_the_lab_reads(tmp_path, monkeypatch):
    "The real notebook on a few steps: recall, benchmarks and their errors among the metrics, items whose mean is the metric, evaluations on the way, usage"
    papermill = pytest.importorskip("papermill")
    pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'peer_nb[eval]'")
    scenes = [dict(activity_label="Counting", ctx_a=f"{i} stones.", ctx_b="he", endings=[f"takes {c}." for c in "abcd"], label=str(i*7 % 4)) for i in range(10)]
    write_hub_shape({"default": dict(train=scenes, validation=[*scenes, scenes[0]])}, tmp_path/"items"/"Rowan"/"hellaswag")
    monkeypatch.setenv("PEER_NB_DATA", str(tmp_path/"items"))
    (tmp_path/"words.jsonl").write_text("".join(json.dumps({"text": f"{a} plus {b} is {a + b}. " * 3}) + "\n" for a in range(12) for b in range(12)))
    task = dict(num_pairs=6, num_known=6, num_novel=4)
    config = dict(model_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=257, max_position_embeddings=48, memory_layers=[1],
                                    peer_config=dict(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16),
                                    mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)),
                  train_config=dict(max_steps=9, eval_steps=2, logging_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-3),
                  dataset_config=dict(tokenizer_name="bytes", max_seq_length=48, heldout_fraction=0.1,
                                      datasets=[dict(name="words", path=str(tmp_path/"words.jsonl")), dict(name="facts", task="digit_lookup", task_arguments=task, mask="digit_lookup")]),
                  eval_config=dict(evals=["hellaswag"], datasets=[dict(name="words", path=str(tmp_path/"words.jsonl"))]))
    (tmp_path/"base.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path/"run"
    run.mkdir()
    papermill.execute_notebook(str(ROOT/"nbs"/"experiments"/"train_and_evaluate.ipynb"), str(run/"notebook.ipynb"), progress_bar=False, kernel_name="python3",
                               parameters=dict(config_path=str(tmp_path/"base.yaml"), run_dir=str(run), levels={"axis": "level"}, overrides='{"train_config.max_steps": 4}'))
    found = Run(run)
    result = found.result
    assert result.usage["layers"]["1"]["rows"] == 64 and result.training["steps"] == 4
    counted = metric_columns(found)
    for metric in ("words/bits_per_byte", "facts/test_known/exact_match", "facts/test_novel/answer_logprob", "hellaswag/acc"):
        items = found.items[metric]
        assert np.isclose(np.mean([value for value, _ in items.values()]), result.metrics[metric]) and counted[f"{metric}:se"] == result.standard_errors[metric]
        assert counted[f"{metric}:peak_step"] in (2, 4)
    assert len(found.items["facts/test_known/exact_match"]) == 6 and "item_scores" not in result.benchmarks
    scored = found.items["hellaswag/acc"]
    assert len(scored) == 11 and len({cluster for _, cluster in scored.values()}) == 10 and {value for value, _ in scored.values()} <= {0.0, 1.0}
    text = "".join(str(o) for c in nbformat.read(run/"notebook.ipynb", 4).cells for o in c.get("outputs", []))
    samples = read_jsonl(found.path("samples"))
    assert samples and all(len((s["prompt"] + s["text"]).encode()) <= 4*48 for s in samples), "twelve tokens and forty more do not fit"
    assert "Asked for what it was taught" in text and "Traceback" not in text


@pytest.mark.parametrize("seeds, missing", [([1], []), ([1, 2, 3], []), ([1, 2], [0, 7]), ([5, 6], [1, 2, 3])])
def test_main_effects_against_a_pivot(seeds, missing):
    "The same numbers from a pandas pivot table, and where runs are missing from numpy's least squares with indicators by pandas, on made-up results with known effects"
    rng = np.random.default_rng(len(missing) + len(seeds))
    axes = {"mix": ["a", "b"], "size": ["s", "m", "l"], "heads": ["1", "4"]}
    known = {"b": -0.5, "m": 0.1, "l": 0.3, "4": -0.04}
    rows = pd.DataFrame([dict(run=f"{m}{z}{h}{s}", mix=m, size=z, heads=h, seed=s, state="DONE", loss=2 + known.get(m, 0) + known.get(z, 0) + known.get(h, 0) + 0.3*s + 1e-3*rng.standard_normal())
                         for m, z, h, s in itertools.product(*axes.values(), seeds)])
    rows.loc[missing, "state"] = "FAILED"
    effects = effects_table(rows, axes, "loss").set_index(["axis", "level"])
    done = rows[rows.state == "DONE"].reset_index(drop=True)
    mains = {axis: pd.get_dummies(done[axis]).astype(float)[levels] for axis, levels in axes.items()}
    X = np.column_stack([pd.get_dummies(done.seed), *mains.values(), *(mains[a].mul(mains[b][l], axis=0) for a, b in itertools.combinations(axes, 2) for l in axes[b])])
    beta, *_ = np.linalg.lstsq(X.astype(float), done.loss.to_numpy())
    cells = [dict(zip(axes, levels)) for levels in itertools.product(*axes.values())]
    def predicted(cell): return np.concatenate([np.full(len(seeds), 1/len(seeds)), *([l == cell[a] for l in axes[a]] for a in axes), *([(l == cell[a])*(m == cell[b]) for l in axes[a]] for a, b in itertools.combinations(axes, 2) for m in axes[b])])@beta
    for axis, levels in axes.items():
        table = done.pivot(index=[c for c in ["mix", "size", "heads", "seed"] if c != axis], columns=axis, values="loss").reindex(columns=levels)
        wide, index = table.to_numpy(), table.index
        for n, level in enumerate(levels):
            found = effects.loc[(axis, level)]
            column = wide[:, n][~np.isnan(wide[:, n])]
            assert found.runs == len(column) and np.isclose(found.level_mean, column.mean())
            if n == 0: assert found.pairs == 0 and np.isnan(found["mean"]); continue
            by_seed = pd.Series(wide[:, n] - wide[:, 0], index).groupby("seed").mean().dropna()
            fitted = np.mean([predicted({**c, axis: level}) - predicted({**c, axis: levels[0]}) for c in cells])
            assert found.pairs == np.isfinite(wide[:, n] - wide[:, 0]).sum() and np.isclose(found["mean"], fitted)
            assert missing or np.isclose(found["mean"], by_seed.mean()) and (len(by_seed) < 2 or np.isclose(found.sd, by_seed.std(ddof=1)))
            assert abs(found["mean"] - known[level]) < 2e-3


def test_a_page_while_nothing_is_done_yet(tmp_path):
    work = write_study(tmp_path)
    request = runner.read_request(None, work/"study.yaml", None, None, None, None, [])
    folder = runner.make_folder(work/"out", make_plan(request.study, request.base), "cpu")
    runs = load_runs(folder)
    text = write_report(runs).read_text()
    assert "0 of 4" in text and runs.rows.state.tolist() == ["TODO"]*4


@pytest.mark.parametrize("words, said", [(["--gpus", 4], "--gpus 4: this machine has no CUDA device"), (["--gpus", 1, "--dry-run"], "--processes 1 makes"),
                                         (["--launcher", "slurm", "--gpus", 1], "there is no sbatch here")])
def test_what_this_machine_has_not_is_refused_before_anything_is_made(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))   # neither nvidia-smi nor sbatch
    work = write_study(tmp_path/"study")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(capsys, "--study", work/"study.yaml", "--output-dir", work/"out", *words)
    assert code == 2 and said in err and err.count("\n") == 1 and not out and sorted(tmp_path.rglob("*")) == before, err


@pytest.mark.slow
def test_nobody_asked_for_gpus_and_there_are_none(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launching, "gpu_devices", lambda: [])
    work = write_study(tmp_path, study_with(axes={"rate": {"low": {}, "high": {"train_config.learning_rate": 0.02}}}))
    code, out, _ = call(capsys, "--study", work/"study.yaml", "--output-dir", work/"out")
    assert code == 0 and "on the CPU (no CUDA device here)" in out
    monkeypatch.setattr(launching, "gpu_devices", lambda: list("0123"))   # made on the CPU, so continued there
    folder, = (work/"out").iterdir()
    Run.of(folder, load_plan(folder).cells[0].id).set_aside()
    code, out, err = call(capsys, "--resume", "--output-dir", work/"out")
    assert code == 0 and "on the CPU" in out, err


def test_a_module_beside_the_template_is_part_of_the_experiment(tmp_path):
    "It, and what it imports in turn; another file in the folder is not"
    from peer_nb.study.identity import package_hash
    work = write_study(tmp_path, template=[TEMPLATE[0], "import json, helper\nfrom peer_nb.files import write_json", *TEMPLATE[1:]])
    before = package_hash(work/"template.ipynb")
    (work/"unused.py").write_text("x = 1\n")
    assert package_hash(work/"template.ipynb") == before
    seen = [before]
    for name, text in (("helper.py", "import deeper\n"), ("helper.py", "from deeper.inner import y\n"), ("deeper/inner.py", "y = 1\n"), ("deeper/inner.py", "y = 2\n")):
        (work/name).parent.mkdir(exist_ok=True)
        (work/name).write_text(text)
        seen.append(package_hash(work/"template.ipynb"))
    assert len({*seen}) == 5


def test_a_quota_of_cores_is_kept(tmp_path, monkeypatch):
    "As a container has it: control groups of both kinds, with and without a limit"
    real = Path.read_text
    def cores(files):
        monkeypatch.setattr(Path, "read_text", lambda self, *a, **k: files[str(self)] if str(self) in files else real(self, *a, **k))
        monkeypatch.setattr(Path, "is_file", lambda self: str(self) in files)
        return launching._cores()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    own = {"/proc/self/cgroup": "0::/box\n"}
    assert cores(own) == 8 and cores(own | {"/sys/fs/cgroup/box/cpu.max": "max 100000\n"}) == 8
    assert cores(own | {"/sys/fs/cgroup/box/cpu.max": "150000 100000\n"}) == 2 and cores(own | {"/sys/fs/cgroup/cpu.max": "20000 100000\n"}) == 1
    assert cores({"/proc/self/cgroup": "4:cpu,cpuacct:/box\n", "/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "300000\n", "/sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n"}) == 3
    assert cores({"/proc/self/cgroup": "4:cpu:/\n", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}) == 8


def test_built_in_axes_take_seeds_and_a_primary_metric(tmp_path, capsys):
    work = write_study(tmp_path)
    ask = ["plan", "--base-config", work/"base.yaml", "--axes", "selection_heads", "--gpus", 0, "--notebook", work/"template.ipynb"]
    code, out, _ = call(capsys, *ask, "--seeds", 5, 6, "--primary", "words/loss")
    assert code == 0 and "6 runs; " in out and "5 6" in out and "2 seeds, power 80 %" in out
    for words, said in [(["--seeds", 5, 5], "a seed is there twice"), (["--seeds", -1], "--seeds"), (["--primary", "mmlu/acc"], "will not be measured")]:
        code, _, err = call(capsys, *ask, *words)
        assert code == 2 and said in err and err.count("\n") == 1, err
