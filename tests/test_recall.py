"Recall against transformers' `generate`, one question at a time, and across starts, kills and processes."
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from children import Child
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peer_nb.analysis.explain import compared_sides, said_of_recall
from peer_nb.cli import make_main
from peer_nb.config import Config, DatasetConfig, DatasetEntry, MLAConfig, ModelConfig, PeerConfig, to_dict
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation import recall_command
from peer_nb.evaluation.recall import TokenTexts, answer_batches, encode_questions, questions_of, read_questions, recall_of
from peer_nb.evaluation.recall_command import SCHEMA, recall
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.stats import wilson
from peer_nb.tasks.registry import TASKS, find_task
from peer_nb.tasks.writing import generate, write_task

SMALL = dict(synthetic_qa=dict(num_pairs=24, frequencies=[1, 4]), digit_lookup=dict(num_pairs=20, num_novel=6, num_known=8), two_hop=dict(num_entities=24, num_novel=3, num_novel_ood=3, num_known=6),
             hashhop=dict(num_samples=2, num_eval=3, n_chars=60, num_queries=2, lengths=[3]))
main = make_main("peer-eval", {"recall": recall})
COMMAND = "import sys; from peer_nb.cli import make_main; from peer_nb.evaluation.recall_command import recall; sys.exit(make_main('peer-eval', {'recall': recall})())"


def rows_of(columns: dict) -> list[dict]: return [dict(zip(columns, values)) for values in zip(*columns.values())]


def asked(task: str, **arguments) -> list:
    return [q for split, columns in generate(task, **(SMALL[task] | arguments)).items() if "prompt" in columns and split != "train"
            for i, row in enumerate(rows_of(columns)) for q in questions_of(find_task(task), split, i, row)]


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer(DatasetConfig(tokenizer_name="bytes"))


@pytest.fixture(scope="module")
def gluing(tmp_path_factory):
    "A tokenizer whose tokens have two and three digits, and straddle"
    file = tmp_path_factory.mktemp("corpus")/"pairs.jsonl"
    file.write_text("\n".join(json.dumps(dict(text=t)) for t in generate("synthetic_qa", num_pairs=400)["train"]["text"][:4000]))
    return load_tokenizer(DatasetConfig([DatasetEntry("pairs", str(file), format="json")], "corpus:bpe:400", max_seq_length=64))


def peer(vocabulary: int):
    memory = PeerConfig(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="batch")
    cfg = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=vocabulary, initializer_range=.2, max_position_embeddings=512,
                      peer_start_layer=1, peer_config=memory, mla_config=MLAConfig(None, 16, 8, 16, 8))
    return PeerMLAForCausalLM(PeerMLAConfig(**to_dict(Config(cfg))["model_config"]))


def llama(vocabulary: int, width: int = 32):
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=2*width, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=512, initializer_range=.2))


def gpt2(vocabulary: int):
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, n_positions=512, initializer_range=.2))


def sliding(vocabulary: int):
    "A model whose cache cannot be cut"
    from transformers import MistralConfig, MistralForCausalLM
    return MistralForCausalLM(MistralConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, sliding_window=6,
                                            max_position_embeddings=512, initializer_range=.2))


def alone(model, tokenizer, e) -> list[int]:
    "What `generate` says to one question"
    out = model.generate(torch.tensor([e.context]), attention_mask=torch.ones(1, len(e.context), dtype=torch.long), max_new_tokens=len(e.question.answer) + e.lead + 1,
                         do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    return out[0, len(e.context):].tolist()


# ---- the same answers as generate ----

@pytest.mark.parametrize("build", [peer, llama, gpt2, sliding])
@pytest.mark.parametrize("task", TASKS)
def test_generated_answers_are_those_of_generate(build, task, tokenizer):
    torch.manual_seed(3)
    model, encoded, pieces = build(len(tokenizer)).eval(), encode_questions(tokenizer, asked(task)[::3]), TokenTexts(tokenizer)
    records = {r["id"]: r for batch in answer_batches(model, tokenizer, encoded, batch_tokens=700) for r in batch}
    assert len(records) == len(encoded)
    for e in encoded: assert records[e.question.id]["said"] == pieces.said(e, alone(model, tokenizer, e))[0]


def overfit(model, tokenizer, texts: list[str], steps: int):
    "Train until these are known"
    torch.manual_seed(0)
    cut = [[tokenizer.eos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"]] for t in texts]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in cut], batch_first=True, padding_value=-1)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.)
    for _ in range(steps):
        model(input_ids=ids.clamp(min=0), labels=ids.masked_fill(ids < 0, -100)).loss.backward()
        optimizer.step(); optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("steps", [15, 90])
def test_modes_agree_with_tokens_that_straddle(gluing, steps):
    "Half-learned and learned facts, in pieces of several digits"
    questions = asked("synthetic_qa")
    known = [q for q in questions if q.split == "known"]
    model = overfit(llama(len(gluing), 64), gluing, [q.prompt + q.answer + q.end for q in known], steps)
    encoded, pieces = encode_questions(gluing, questions), TokenTexts(gluing)
    assert max(len(gluing.convert_ids_to_tokens(t)) for e in encoded for t in e.answer) > 1
    records = {r["id"]: r for batch in answer_batches(model, gluing, encoded, batch_tokens=64) for r in batch}
    for e in encoded:
        r = records[e.question.id]
        assert r["said"] == pieces.said(e, alone(model, gluing, e))[0]
        assert r["exact"] or not r["forced_exact"]                        # the same tokens spell the same answer
        agreed = min(r["right"].find("0") % 99, r["forced_right"].find("0") % 99)
        assert r["right"][:agreed] == r["forced_right"][:agreed]
    if steps == 90: assert all(records[q.id]["exact"] for q in known)


def test_answers_with_the_separator_of_a_tokenizer_glued_on(gluing):
    encoded = encode_questions(gluing, asked("synthetic_qa"))
    for e in encoded:
        text = gluing.decode(e.context[1:] + e.answer)
        assert text.startswith(e.question.prompt + e.question.answer)
        assert e.straddles == (e.lead > 0 or e.stop is None)


# ---- numbers ----

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(shares):
    k, n = shares
    theirs = binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


class Scripted(torch.nn.Module):
    "A model that says what a table tells it, whatever it is asked; no cache, no options"
    def __init__(self, table: dict[tuple, int], vocabulary: int):
        super().__init__()
        self.table, self.embedding = table, torch.nn.Embedding(vocabulary, 1)
        self.config = type("config", (), dict(max_position_embeddings=64))()

    def get_input_embeddings(self): return self.embedding

    def forward(self, input_ids, use_cache=False, past_key_values=None):
        logits = torch.zeros(*input_ids.shape, self.embedding.num_embeddings)
        for i, row in enumerate(input_ids.tolist()):
            for t in range(len(row)): logits[i, t, self.table.get(tuple(row[:t + 1]), 0)] = 20.
        return type("out", (), dict(logits=logits, past_key_values=None))()


@pytest.mark.parametrize("wrong", [0, 1, 5])
def test_a_scripted_model_scores_as_scripted(tokenizer, wrong):
    "Right but for one digit in every second answer"
    pairs = generate("digit_lookup", num_pairs=20, num_known=20, num_novel=0)["test_known"]
    table = {}
    for i, (prompt, answer) in enumerate(zip(pairs["prompt"], pairs["answer"])):
        ids = [tokenizer.eos_token_id, *tokenizer(prompt + answer + " ", add_special_tokens=False)["input_ids"]]
        table |= {tuple(ids[:t]): ids[t] for t in range(len(prompt), len(ids))}
        if i % 2: table[tuple(ids[:len(prompt) + 1 + wrong])] = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    found = recall_of(Scripted(table, len(tokenizer)), tokenizer, find_task("digit_lookup"), {"known": pairs})
    assert found["digit_lookup/exact_match"] == .5
    assert found["digit_lookup/digit_accuracy"] == pytest.approx((1 + 5/6)/2)
    assert found["digit_lookup/first_digit_accuracy"] == (.5 if wrong == 0 else 1.)
    assert found["digit_lookup/known/answer_logprob"] == pytest.approx(-10, abs=.01)   # a wrong digit costs 20 nats


def test_recall_of_leaves_the_model_as_it_was(tokenizer):
    model = peer(len(tokenizer)).train()
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    found = recall_of(model, tokenizer, find_task("two_hop"), {s: c for s, c in generate("two_hop", **SMALL["two_hop"]).items() if s != "train"})
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert {f"two_hop/{s}/exact_match" for s in ("one_hop", "known", "novel", "novel_ood")} < set(found)


# ---- the command ----

@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    "A model that knows its pairs, and data of every task"
    place = tmp_path_factory.mktemp("recall")
    for task, arguments in SMALL.items(): write_task(task, place/task, **arguments)
    model = overfit(peer(len(tokenizer)), tokenizer, generate("synthetic_qa", **SMALL["synthetic_qa"])["known"]["text"], 110)
    model.save_pretrained(place/"model"); tokenizer.save_pretrained(place/"model")
    return place


def result(folder: Path) -> dict: return json.loads((folder/"recall.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gets_a_page_and_a_valid_file(task, place, tmp_path, monkeypatch):
    import jsonschema
    monkeypatch.chdir(tmp_path)
    assert main(["recall", str(place/"model"), str(place/task), "--logits"]) == 0
    folder, = tmp_path.iterdir()
    found = result(folder)
    jsonschema.validate(found, SCHEMA)
    assert not found["partial"] and found["answered"] == len(read_questions(place/task)[1])
    page = (folder/"index.html").read_text()
    assert "Plotly.newPlot(" in page and "Confidence" in page and page.count("src=") == page.count('src="plotly.min.js"') == 1 and "@import" not in page
    if task == "synthetic_qa": assert found["metrics"]["synthetic_qa/known/exact_match"] > .9 > .1 > found["metrics"]["synthetic_qa/test/exact_match"]
    places = [p for line in (folder/"items-0.jsonl").read_text().splitlines() for p in json.loads(line)["places"]]
    assert all(abs(sum(p for *_, p in place["top"]) + place["rest"] - 1) < 1e-4 for place in places)


def test_explain_reads_the_answers_of_two_models(place, tokenizer, tmp_path):
    "A model that knows its pairs against one that was never trained, by scipy's test over the answers in both folders"
    torch.manual_seed(0)
    for part in (peer(len(tokenizer)), tokenizer): part.save_pretrained(tmp_path/"other")
    for name, model in (("knows", place/"model"), ("other", tmp_path/"other")):
        assert main(["recall", str(model), str(place/"synthetic_qa"), "--splits", "known", "--output", str(tmp_path/f"of-{name}")]) == 0
    files = [tmp_path/f"of-{name}"/"recall.json" for name in ("knows", "other")]
    told = {f.metric: f for f in compared_sides(files[:1], files[1:], None)}
    right, logp = ([{i: a[key] for i, a in answers(f.parent).items()} for f in files] for key in ("exact", "logprob"))
    wins, losses = (sum(one[i] and not two[i] for i in one) for one, two in (right, right[::-1]))
    exact, loss = told["exact_match (known)"], told["answer_logprob (known)"]
    assert wins > losses and (exact.method, exact.n, exact.p) == ("mcnemar", len(right[0]), pytest.approx(binomtest(wins, wins + losses).pvalue))
    assert loss.method == "paired bootstrap" and loss.difference == pytest.approx(sum(logp[0][i] - logp[1][i] for i in logp[0]) / len(logp[0])) and loss.low > 0
    said = {s.name: s for s in said_of_recall(result(files[0].parent)) if s.name.startswith("exact_match (known")}
    share = binomtest(sum(right[0].values()), len(right[0])).proportion_ci(method="wilson")
    whole = said["exact_match (known)"]
    assert (whole.low, whole.high) == pytest.approx((share.low, share.high)) and whole.n == len(right[0])


def command(*words: str): sys.exit(main([*words]))


def command_that_stays(answers: int, *words: str):
    "The command, held up after some answers until it is stopped"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    append, written = recall_command.append_jsonl, itertools.count(1)

    def held_up(*args, **kwargs):
        append(*args, **kwargs)
        while next(written) >= answers: time.sleep(1)

    recall_command.append_jsonl = held_up
    command(*words)


def words_for(place: Path, output: Path, *more: str) -> list[str]:
    return ["recall", str(place/"model"), str(place/"synthetic_qa"), "--output", str(output), *more]


def answers(folder: Path) -> dict[str, dict]:
    return {r["id"]: r for file in folder.glob("items-*.jsonl") for r in map(json.loads, file.read_text().splitlines())}


def same_answers(one: Path, two: Path):
    "Two processes have found what one has, each question once"
    first, second = answers(one), answers(two)
    assert [len(f.read_text().splitlines()) for f in sorted(two.glob("items-*.jsonl"))] == [12, 12]
    assert first.keys() == second.keys() and all(first[i]["said"] == second[i]["said"] and first[i]["logprob"] == pytest.approx(second[i]["logprob"], abs=1e-4) for i in first)
    assert result(two)["environment"]["processes"] == 2
    assert result(two)["metrics"] == pytest.approx(result(one)["metrics"], abs=1e-4)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(place, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in range(2)]
    for both in [Child(command, *words_for(place, tmp_path/"two"), **rank) for rank in ranks]: both.ends(0)
    assert main(words_for(place, tmp_path/"one")) == 0
    same_answers(tmp_path/"one", tmp_path/"two")
    refused = [Child(command, *words_for(place, tmp_path/"two", "--mode", "teacher"), **rank) for rank in ranks]
    for both in refused: both.ends(2)
    assert "different mode" in refused[0].output() and "different mode" not in refused[1].output()   # refused by both, said by one


@pytest.mark.slow
def test_torchrun_finds_what_one_process_finds(place, tmp_path):
    script = tmp_path/"command.py"
    script.write_text(COMMAND)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script)]
    done = subprocess.run([*launch, *words_for(place, tmp_path/"two")], capture_output=True, text=True, timeout=600, env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parent.parent)))
    assert done.returncode == 0, done.stderr
    assert main(words_for(place, tmp_path/"one")) == 0
    same_answers(tmp_path/"one", tmp_path/"two")


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_second_start_asks_what_is_left(place, tmp_path, stop):
    "Stopped in the middle by Ctrl-C or kill -9"
    folder = tmp_path/"out"
    lines = lambda: b"".join(file.read_bytes() for file in folder.glob("items-*.jsonl")).count(b"\n")
    first = Child(command_that_stays, 3, *words_for(place, folder, "--batch-tokens", "1"))       # a question at a time
    while lines() < 3 and first.process.poll() is None: time.sleep(.05)
    first.process.send_signal(stop)
    first.ends(130 if stop == signal.SIGINT else -stop)
    assert "Traceback" not in first.output()
    kept = (folder/"items-0.jsonl").read_bytes()
    done = kept.count(b"\n")
    assert done == 3
    if stop == signal.SIGINT: assert result(folder)["partial"] and result(folder)["answered"] == done
    else: assert not (folder/"recall.json").exists()
    assert main(words_for(place, folder)) == 0
    assert (folder/"items-0.jsonl").read_bytes().startswith(kept[:kept.rfind(b"\n") + 1])
    assert not result(folder)["partial"] and result(folder)["answered"] == len(answers(folder)) == 24


def broken(place: Path, tmp_path: Path, what: str) -> list[str]:
    "Words of a command line that cannot work"
    model, data = place/"model", place/"synthetic_qa"
    if what == "missing": return [str(tmp_path/"nowhere"), str(data)]
    if what == "no data": return [str(model), str(tmp_path)]
    if what == "empty":
        write_task("synthetic_qa", tmp_path/"none", num_pairs=8, frequencies=[1], val_fraction=0., test_fraction=.1)
        return [str(model), str(tmp_path/"none"), "--splits", "val"]
    if what == "no tokenizer": llama(300).save_pretrained(tmp_path/"bare")
    if what == "other tokenizer":
        llama(100).save_pretrained(tmp_path/"bare")
        load_tokenizer(DatasetConfig(tokenizer_name="bytes")).save_pretrained(tmp_path/"bare")
    if what == "half":
        shutil.copytree(model, tmp_path/"bare")
        kept = {n: t for n, t in load_file(model/"model.safetensors").items() if ".memory.keys" not in n}
        save_file(kept, tmp_path/"bare"/"model.safetensors", metadata=dict(format="pt"))
    if what == "foreign":
        (tmp_path/"bare").mkdir()
        (tmp_path/"bare"/"config.json").write_text('{"model_type": "bert"}')
    return [str(tmp_path/"bare"), str(data)]


@pytest.mark.parametrize("what,why", [("missing", "no config.json"), ("no data", "peer-data TASK"), ("empty", "holds no questions"), ("no tokenizer", "bare"),
                                      ("other tokenizer", "the tokenizer does not match the model"), ("half", "lacks"), ("foreign", "bare")])
def test_what_cannot_be_asked_is_said_in_one_sentence(place, tmp_path, capsys, what, why):
    assert main(["recall", *broken(place, tmp_path, what), "--output", str(tmp_path/"out")]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("error:") == 1 and "Traceback" not in said


def test_one_question_token_by_token(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recall", str(place/"model"), str(place/"two_hop"), "--show", "novel/1"]) == 0
    shown = capsys.readouterr().out
    question = next(q for q in read_questions(place/"two_hop")[1] if q.id == "novel/1")
    assert question.prompt in shown and question.answer in shown and len(shown.splitlines()) >= 10
    assert not list(tmp_path.iterdir())
