"Benchmarks against models that are made to know the answers, not to know them, or to guess."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy.stats import binom, binomtest

pytest.importorskip("lm_eval", reason="benchmarks need lm-eval: pip install 'peer_nb[eval]'")

from lm_eval.api.model import TemplateLM  # noqa: E402

from peer_nb.findings.effects import item_evidence  # noqa: E402
from peer_nb.study.run import Run  # noqa: E402
from peer_nb.config import Config, DatasetConfig, EvalConfig, config_from_dict, to_dict  # noqa: E402
from peer_nb.data.corpora import load_tokenizer  # noqa: E402
from peer_nb.evaluation.benchmarks import FEWSHOT_SEED, Answers, benchmark_metrics, evaluate_tasks, item_scores, load_tasks, prepare, run_benchmarks, run_tasks  # noqa: E402
from peer_nb.analysis.explain import compared_sides, said_of_benchmarks  # noqa: E402
from peer_nb.evaluation.command import main, write_results  # noqa: E402
from peer_nb.evaluation.items import write_hub_shape  # noqa: E402
from peer_nb.files import UserError, read_json, read_jsonl  # noqa: E402

CHOICE = ["hellaswag", "mmlu", "truthfulqa_mc1"]
REAL = os.environ.get("PEER_NB_DATA")
real_items = pytest.mark.skipif(not REAL, reason="needs real benchmark items: set PEER_NB_DATA to their folder")
AIME = [dict(ID=f"2024-I-{n}", Problem=f"What is {n} + {n}?", Solution="Add.", Answer=2*n) for n in range(1, 13)]


def scenes(n: int) -> list[dict]:
    return [dict(activity_label="Counting", ctx_a=f"Somebody counts {i} stones.", ctx_b="then he", endings=[f"takes {i} of {c}." for c in "abcd"], label=str(i*7 % 4)) for i in range(n)]


def made_up(root: Path) -> Path:
    "A few items of each benchmark in the shape that the hub has them"
    sums = [dict(question=f"What is {n} + {n}?", answer=f"Twice {n} is {2*n}.\n#### {2*n}") for n in range(1, 13)]
    quiz = lambda topic: [dict(question=f"{topic} question {i}?", subject=topic, choices=[f"answer {i}{c}" for c in "pqrs"], answer=i*5 % 4) for i in range(14)]
    targets = lambda i, true: dict(choices=[f"{i} is a number", *[f"{i} is {x}" for x in ("a letter", "a fish", "blue")]], labels=[1]*true + [0]*(4 - true))
    program = dict(task_id="HumanEval/0", prompt='def twice(x):\n    """Twice x"""\n', entry_point="twice", canonical_solution="    return 2*x\n", test="def check(candidate):\n    assert candidate(4) == 8\n")
    problems = [dict(problem=f"What is ${n}^2$?", solution=f"It is $\\boxed{{{n*n}}}$.", answer=str(n*n), subject="Algebra", level=1) for n in range(2, 9)]
    sets = {"openai/gsm8k": {"main": dict(train=sums, test=sums)}, "Rowan/hellaswag": {"default": dict(train=scenes(3), validation=scenes(24))},
            "cais/mmlu": {t: dict(dev=quiz(t)[:5], validation=quiz(t)[:2], test=quiz(t)) for t in ("anatomy", "virology", "world_religions")},
            "truthfulqa/truthful_qa": {"multiple_choice": dict(validation=[dict(question=f"What is {i}?", mc1_targets=targets(i, 1), mc2_targets=targets(i, 2)) for i in range(12)])},
            "openai/openai_humaneval": {"openai_humaneval": dict(test=[program, program | dict(task_id="HumanEval/1", prompt='def double(x):\n    """Double x"""\n', entry_point="double")])},
            "HuggingFaceH4/MATH-500": {"default": dict(test=problems)}, "Maxwell-Jia/AIME_2024": {"default": dict(train=AIME)},
            "gneubig/aime-1983-2024": {"default": dict(train=[dict(ID=a["ID"], Year=2024, Question=a["Problem"], Answer=str(a["Answer"])) for a in AIME])}}
    for name, content in sets.items(): write_hub_shape(content, root/name)
    return root


@pytest.fixture(scope="session")
def items(tmp_path_factory) -> Path: return made_up(tmp_path_factory.mktemp("items"))


@pytest.fixture(scope="session", params=["made up", pytest.param("real", marks=real_items)])
def root(request, items) -> Path: return items if request.param == "made up" else Path(REAL)


class Scripted(TemplateLM):
    "A model of lm-eval's own kind whose answer to each question is laid down"
    def __init__(self, reply):
        super().__init__()
        self.reply, self.asked = reply, 0
    eot_token_id = 0
    def tok_encode(self, string, add_special_tokens=None, **_): return list(string.encode())
    def _loglikelihood_tokens(self, requests, **_):
        self.asked += len(requests)
        return [(self.reply(context, rest), False) for (context, rest), _, _ in requests]
    def loglikelihood_rolling(self, requests, disable_tqdm=False): return [self.reply(*r.args) for r in requests]
    def generate_until(self, requests, disable_tqdm=False):
        self.asked += len(requests)
        return [self.reply(*r.args) for r in requests]


def key_of(task) -> dict[tuple[str, str], bool]:
    "(question, choice) -> whether it is a right answer, as lm-eval itself words them"
    key = {}
    for request in task.instances:
        target, choices = task.doc_to_target(request.doc), task.doc_to_choice(request.doc)
        right = {target} if "mc2" not in task.config.task else {i for i, l in enumerate(request.doc["mc2_targets"]["labels"]) if l == 1}
        key[request.args] = request.idx in right
        assert request.args[1].strip() == choices[request.idx].strip()
    return key


@pytest.fixture(scope="session")
def choice_tasks(root):
    "Multiple-choice tasks with their questions built, and which answers are right"
    loaded = load_tasks([*CHOICE, "truthfulqa_mc2"], root)
    prepare(loaded)
    evaluate_tasks(Scripted(lambda context, rest: 0.0), loaded, limit=60)
    return loaded, {name: key_of(task) for name, task in loaded.tasks.items()}


def scores(loaded, reply, limit=60) -> dict[str, float]:
    result, _ = run_tasks(Scripted(reply), loaded, limit=limit)
    return {name: row["metrics"]["acc"]["value"] for name, row in result["tasks"].items()}


@pytest.mark.parametrize("sign, expected", [(1, 1.0), (-1, 0.0)])
def test_who_knows_the_answers_scores_one_and_who_knows_the_wrong_ones_zero(choice_tasks, sign, expected):
    loaded, keys = choice_tasks
    right = {question: yes for key in keys.values() for question, yes in key.items()}
    found = scores(loaded, lambda *question: 0.0 if right[question] == (sign > 0) else -50.0*len(question[1]))
    assert len(found) == 3 + sum(name.startswith("mmlu") for name in found) and len(found) >= 6
    for name, value in found.items(): assert value == pytest.approx(expected, abs=1e-9), name


def test_who_guesses_is_inside_the_binomial_interval(choice_tasks):
    loaded, _ = choice_tasks
    import hashlib
    def guess(*question): return -1 - int(hashlib.sha256("|".join(question).encode()).hexdigest()[:8], 16) / 2**32
    result, scored = run_tasks(Scripted(guess), loaded, limit=60)
    for name, row in [*result["tasks"].items(), *result["groups"].items()]:
        if name == "truthfulqa_mc2": continue                     # a share of probability, not a count
        n, acc, chance = row["items"], row["metrics"]["acc"], row["chance"]
        low, high = binom.interval(0.9999, n, chance)
        assert low <= acc["value"] * n <= high, (name, acc, chance)
        assert acc["ci"][0] <= acc["value"] <= acc["ci"][1]
        if name in result["tasks"]: assert acc["se"] == pytest.approx((acc["value"]*(1 - acc["value"])/(n - 1))**.5, abs=1e-9)


def test_two_models_are_compared_on_the_same_items(choice_tasks, tmp_path):
    "The lab's evidence for a claim about a benchmark, against scipy's test on lm-eval's own samples; a group's items are its tasks'"
    import hashlib
    loaded, keys = choice_tasks
    right, own = {question: yes for key in keys.values() for question, yes in key.items()}, {}
    def knows(share, salt):                      # a share of the contexts, and the same wrong answer to the others
        def reply(context, rest):
            luck = int(hashlib.sha256(f"{salt}{context}".encode()).hexdigest()[:8], 16) / 2**32
            return 0.0 if right[context, rest] == (luck < share) else -50.0*len(rest)
        return reply
    for run, reply in dict(a=knows(0.9, "a"), b=knows(0.5, "b")).items():
        result, scored = run_tasks(Scripted(reply), loaded, limit=60)
        (tmp_path/run).mkdir()
        (tmp_path/run/"items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in item_scores(result, scored)))
        own[run] = scored.engine["samples"]
        write_results(tmp_path/run, result, scored, run)
        for metric, value in benchmark_metrics(result).items():
            if metric.endswith("_se"): continue
            values = [v for v, _ in Run(tmp_path/run).items[metric].values()]
            assert sum(values) / len(values) == pytest.approx(value, abs=1e-9), metric
    mmlu = [name for name in own["a"] if name.startswith("mmlu_")]
    for metric, tasks in [("hellaswag/acc", ["hellaswag"]), ("truthfulqa_mc1/acc", ["truthfulqa_mc1"]), ("mmlu/acc", mmlu)]:
        both = [(x["acc"], y["acc"]) for name in tasks for x, y in zip(own["a"][name], own["b"][name], strict=True)]
        wins, losses = sum(x > y for x, y in both), sum(x < y for x, y in both)
        found, _, said = item_evidence({n: Run(tmp_path/n) for n in "ab"}, [("a", "b", 1)], metric, 1.0, 0.0)
        assert found.mean == pytest.approx((wins - losses) / len(both)) and found.n == len(both), metric
        assert found.p == pytest.approx(binomtest(wins, wins + losses).pvalue) and said == f"{wins} only a has right, {losses} only b (McNemar)"
        if len(tasks) == 1:                      # peer-analyze explain reads the same from the folders
            told, = compared_sides([tmp_path/"a"/"results.json"], [tmp_path/"b"/"results.json"], metric)
            assert (told.method, told.n) == ("mcnemar", len(both)) and (told.p, told.difference) == pytest.approx((found.p, found.mean))
            alone = {said.name: said for said in said_of_benchmarks(read_json(tmp_path/"a"/"results.json"))}[metric]
            share, n = sum(x for x, _ in both) / len(both), len(both)
            assert (alone.value, alone.n, alone.high - alone.low) == pytest.approx((share, n, 3.92*(share*(1 - share)/(n - 1))**.5))


def test_half_the_mmlu_subjects_are_said(choice_tasks):
    loaded, _ = choice_tasks
    assert any("mmlu" in c and "of its 57 tasks are in the folder" in c for c in loaded.caveats)


GENERATED = {   # task -> the right answer to an item, a wrong one
    "gsm8k": (lambda doc: doc["answer"], "#### 7.5"), "hendrycks_math500": (lambda doc: "$" + doc["answer"] + "$", "no idea"),
    "aime24": (lambda doc: f"So \\boxed{{{doc['Answer']}}}", "\\boxed{1000}"), "aime": (lambda doc: f"${doc['Answer']}$", "$1000$"),
    "humaneval": (lambda doc: doc["canonical_solution"], "    return None\n")}


@pytest.mark.parametrize("name", GENERATED)
def test_generated_answers(name, root, items):
    loaded = load_tasks([name], items if name.startswith("aime") else root, allow_code=True)
    task, = loaded.tasks.values()
    right, wrong = GENERATED[name]
    prepare(loaded)
    answers = {}
    limit = 4 if name == "humaneval" else 12
    for is_right in (True, False):
        def reply(context, _): return answers[context] if is_right else wrong
        if is_right:
            task.set_fewshot_seed(FEWSHOT_SEED)          # the examples in the prompts are drawn from the same seed
            task.build_all_requests(limit=limit)
            answers = {r.args[0]: right(r.doc) for r in task.instances}
        result, _ = run_tasks(Scripted(reply), loaded, limit=limit)
        metrics = {m: v["value"] for m, v in result["tasks"][name]["metrics"].items()}
        assert set(metrics.values()) == {1.0 if is_right else 0.0}, metrics


def test_minerva_is_scored_or_says_what_it_needs(root):
    try: import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"minerva_math500: .*math_verify"): load_tasks(["minerva_math500"], root)
        return
    loaded = load_tasks(["minerva"], root)
    task = loaded.tasks["minerva_math500"]
    prepare(loaded)
    task.build_all_requests(limit=6)
    right = {r.args[0]: f"Final Answer: The final answer is ${r.doc['answer']}$. I hope it is correct." for r in task.instances}
    for reply, expected in ((lambda c, _: right[c], 1.0), (lambda c, _: "Final Answer: The final answer is $x_9$. I hope it is correct.", 0.0)):
        result, _ = run_tasks(Scripted(reply), loaded, limit=6)
        assert result["tasks"]["minerva_math500"]["metrics"]["exact_match"]["value"] == expected


@real_items
@pytest.mark.slow
def test_canonical_solutions_of_humaneval_pass_in_the_sandbox():
    loaded = load_tasks(["humaneval"], Path(REAL), allow_code=True)
    prepare(loaded)
    task = loaded.tasks["humaneval"]
    task.build_all_requests()
    solutions = {r.args[0]: r.doc["canonical_solution"] for r in task.instances}
    result, _ = run_tasks(Scripted(lambda context, _: solutions[context]), loaded)
    assert result["tasks"]["humaneval"]["metrics"]["pass@1"]["value"] == 1.0 and result["tasks"]["humaneval"]["items"] == 164


def test_a_broken_row_is_named_by_file_and_line(items, tmp_path):
    write_hub_shape({"main": dict(train=[dict(question="q", answer="#### 1")], test=[dict(question="q", answer="#### 1"), dict(question="q", answer="1")])}, tmp_path/"openai"/"gsm8k")
    with pytest.raises(UserError, match=r"test.jsonl: line 2: answer must be a text with '#### '"): load_tasks(["gsm8k"], tmp_path)


def test_changed_items_are_read_again(tmp_path):
    "The library that reads them keeps what it has read under the folder's name"
    for label in ("0", "3"):
        write_hub_shape({"default": dict(train=scenes(1), validation=[scenes(1)[0] | dict(label=label)])}, tmp_path/"Rowan"/"hellaswag")
        assert load_tasks(["hellaswag"], tmp_path).tasks["hellaswag"].eval_docs[0]["gold"] == int(label)


TINY = dict(model_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=260, max_position_embeddings=320, peer_start_layer=1,
            peer_config=dict(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16),
            mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8)), dataset_config=dict(tokenizer_name="bytes", max_seq_length=320))


@pytest.fixture(scope="session")
def tiny():
    import torch

    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    torch.manual_seed(0)
    return PeerMLAForCausalLM(PeerMLAConfig(**to_dict(config_from_dict(TINY))["model_config"])), load_tokenizer(DatasetConfig(tokenizer_name="bytes"))


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in tiny: part.save_pretrained(folder)
    return folder


def test_benchmarks_of_a_configuration(tiny, items, monkeypatch, tmp_path):
    "eval_config.evals, eval_config.evals_registry_path and eval_config.eval_batch_size, on our own model"
    monkeypatch.setenv("PEER_NB_DATA", str(items))
    (tmp_path/"evals").mkdir(); (tmp_path/"data").mkdir()
    (tmp_path/"evals"/"a.yaml").write_text("doubles: {class: 'evals.elsuite.basic.includes:Includes', args: {samples_jsonl: doubles.jsonl, max_tokens: 8}}\n")
    (tmp_path/"data"/"doubles.jsonl").write_text("\n".join(json.dumps(dict(input=f"{n}+{n}=", ideal=[str(2*n)])) for n in range(3)))
    cfg = config_from_dict(TINY | dict(eval_config=dict(evals=["hellaswag", "truthfulqa_mc2", "doubles", "humaneval"], evals_registry_path=str(tmp_path), eval_batch_size=4)))
    result = run_benchmarks(*tiny, cfg, limit=3)
    assert set(result["tasks"]) == {"hellaswag", "truthfulqa_mc2", "doubles"} and list(result["skipped"]) == ["humaneval"]
    metrics = benchmark_metrics(result)
    assert 0 <= metrics["hellaswag/acc_norm"] <= 1 and "truthfulqa_mc2/acc_se" in metrics and metrics["doubles/accuracy"] in (0, 1/3, 2/3, 1)
    other = config_from_dict(TINY | dict(eval_config=dict(evals=["hellaswag", "truthfulqa_mc2"], eval_batch_size=1)))
    again = benchmark_metrics(run_benchmarks(*tiny, other, limit=3))
    assert again["truthfulqa_mc2/acc"] == pytest.approx(metrics["truthfulqa_mc2/acc"], abs=1e-4)      # the size of a batch changes no score
    assert run_benchmarks(*tiny, config_from_dict(TINY))["tasks"] == {}


def test_lm_evals_own_command_gives_the_same_scores(tiny, items):
    "simple_evaluate with lm-eval's own loading of the same definition, items by an override of the path"
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from peer_nb.evaluation.benchmarks import causal_lm, require_lm_eval
    from peer_nb.evaluation.items import reading_cache
    folder = items/"Rowan"/"hellaswag"
    inline = {"group": "offline", "task": [{"task": "hellaswag", "dataset_path": str(folder), "dataset_kwargs": {"cache_dir": str(reading_cache(folder))}}]}
    theirs = simple_evaluate(model=HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=4, max_length=320, device="cpu", logits_cache=False), tasks=[inline], limit=6, bootstrap_iters=0,
                             task_manager=TaskManager(include_path=str(require_lm_eval()/"hellaswag"), include_defaults=False))["results"]["hellaswag"]
    ours, scored = run_tasks(causal_lm(*tiny, 4, 320), load_tasks(["hellaswag"], items), 320, limit=6)
    for metric in ("acc", "acc_norm"): assert ours["tasks"]["hellaswag"]["metrics"][metric]["value"] == theirs[f"{metric},none"]
    assert all(sample["doc_hash"] and sample["prompt_hash"] for sample in scored.engine["samples"]["hellaswag"])


HELD_UP = """
import sys, time
from peer_nb.evaluation import benchmarks
from peer_nb.evaluation.command import main
append, written = benchmarks.append_jsonl, []
def held_up(*args):
    append(*args)
    written.append(1)
    while len(written) == 3: time.sleep(1)   # until it is stopped
benchmarks.append_jsonl = held_up
sys.exit(main())
"""


def start(checkpoint: Path, items: Path, output: Path, *words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", HELD_UP, "benchmark", str(checkpoint), "truthfulqa_mc1", "--data-root", str(items),
                             "--output", str(output), "--batch-size", "1", "--window", "320", "--limit", "8", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_interrupted_run_keeps_what_it_has_and_continues(checkpoint, items, tmp_path):
    out = tmp_path/"out"
    process = start(checkpoint, items, out)
    while len(read_jsonl(out/"answers.jsonl")) < 3 and process.poll() is None: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=600)
    result = read_json(out/"results.json")
    assert process.returncode == 130 and "Traceback" not in errors, errors
    done = result["tasks"]["truthfulqa_mc1"]["items"]
    assert result["partial"] and 0 < done < 8 and "Interrupted" in (out/"index.html").read_text()
    kept = len(Answers(out/"answers.jsonl").known)
    words = ["benchmark", str(checkpoint), "truthfulqa_mc1", "--data-root", str(items), "--batch-size", "1", "--window", "320", "--limit", "8"]
    assert main([*words, "--output", str(out)]) == 0 and main([*words, "--output", str(tmp_path/"fresh")]) == 0
    again, fresh = (read_json(folder/"results.json") for folder in (out, tmp_path/"fresh"))
    assert again["tasks"] == fresh["tasks"] and not again["partial"]
    assert len(Answers(out/"answers.jsonl").known) == len(Answers(tmp_path/"fresh"/"answers.jsonl").known) > kept
    assert len(read_jsonl(out/"samples"/"truthfulqa_mc1.jsonl")) == 8


@real_items
def test_end_to_end_on_real_items(checkpoint, tmp_path):
    assert main(["benchmark", str(checkpoint), "hellaswag", "gsm8k", "--data-root", REAL, "--limit", "3", "--fewshot", "0", "--max-new-tokens", "8", "--window", "320", "--output", str(tmp_path)]) == 0
    result = read_json(tmp_path/"results.json")
    assert result["tasks"]["hellaswag"]["items"] == 3 and result["tasks"]["hellaswag"]["items_in_set"] == 10042


def test_missing_protection_is_told(items, monkeypatch):
    "What the sandbox cannot do on a system stands among the caveats of the score; where it does not work at all, nothing is scored"
    from peer_nb.evaluation import benchmarks
    from peer_nb.evaluation.sandbox import Outcome
    monkeypatch.setattr(benchmarks, "run_code", lambda source: Outcome(True, "", ("files",)))
    assert load_tasks(["humaneval"], items, allow_code=True).caveats[0].endswith("this system has no protection from using the network, ending other processes")
    monkeypatch.setattr(benchmarks, "run_code", lambda source: Outcome(False, "no python"))
    with pytest.raises(UserError, match="the sandbox for generated code does not work on this system: no python"): load_tasks(["humaneval"], items, allow_code=True)
