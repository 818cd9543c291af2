"Broken files give up complete records only; results are compared by the test that fits; curves show what they lack; a load's reasons are named."
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from peer_nb.analysis.command import main
from peer_nb.analysis.explain import compared_sides, paired_text
from peer_nb.analysis.losses import losses_result, read_curve
from peer_nb.analysis.salvage import salvage_document, salvage_lines
from peer_nb.analysis.why import QUESTIONS, reasons
from peer_nb.analysis.worked_example import facts_config
from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.files import UserError, write_json, write_jsonl
from peer_nb.models.causal_lm import PeerMLAForCausalLM

STUDY = Path(__file__).parent/"earlier_study"
RUNS = sorted((STUDY/"runs").iterdir())


def at(value, place):
    for key in place: value = value[key]
    return value


def leaves(value) -> int: return sum(map(leaves, value.values() if isinstance(value, dict) else value)) if isinstance(value, (dict, list)) and value else 1


def test_two_thousand_cuts_of_real_documents_change_no_record():
    rng, files = random.Random(0), [RUNS[0]/"result.json", RUNS[0]/"heartbeat.json", RUNS[0]/"status.json", RUNS[3]/"result.json"]
    for file in files:
        data = file.read_bytes()
        document, before = json.loads(data), -1
        assert salvage_document(data).records == [([], document)]
        for cut in sorted(rng.randrange(len(data.rstrip())) for _ in range(300)):
            rest = salvage_document(data[:cut])
            for place, value in rest.records: assert json.dumps(at(document, place)) == json.dumps(value), (file, cut, place)
            kept = sum(leaves(value) for _, value in rest.records)
            assert before <= kept <= leaves(document) and (rest.lost or cut == len(data))             # a later cut keeps no less
            assert rest.lost[0][0] + rest.lost_bytes == cut
            before = kept
        assert kept >= .8*leaves(document)


def test_cuts_and_damage_of_real_logs_cost_their_own_line():
    rng = random.Random(1)
    for file in (RUNS[0]/"metrics.jsonl", RUNS[1]/"items.jsonl"):
        data = file.read_bytes()
        lines = data.split(b"\n")[:-1]
        for cut in (rng.randrange(len(data)) for _ in range(800)):
            found = [value for _, value in salvage_lines(data[:cut]).records]
            whole = data[:cut].split(b"\n")
            assert found == [json.loads(line) for line in lines[:len(whole) - 1 + (len(whole[-1]) > 0 and whole[-1] == lines[len(whole) - 1])]]
        place = rng.randrange(len(lines))
        torn = b"\n".join(lines[:place] + [lines[place][:7] + b"\xff" + lines[place][8:]] + lines[place + 1:]) + b"\n"
        rest = salvage_lines(torn)
        assert [p for p, _ in rest.records] == [[n + 1] for n in range(len(lines)) if n != place] and len(rest.lost) == 1


def test_salvage_writes_lines_as_they_were(tmp_path, capsys):
    data = (RUNS[0]/"items.jsonl").read_bytes()
    (tmp_path/"items.jsonl").write_bytes(data[:-30])
    assert main(["salvage", str(tmp_path/"items.jsonl")]) == 0
    kept = (tmp_path/"items.salvaged.jsonl").read_bytes()
    assert data.startswith(kept) and len(kept) > .9*len(data) and "lost from byte" in capsys.readouterr().out
    (tmp_path/"no.json").write_text("nothing")
    for words, said in ((["no.json"], "holds no complete record"), (["none.json"], "cannot be read"), (["items.jsonl", "--output", str(tmp_path/"items.jsonl")], "is the broken file itself")):
        assert main(["salvage", str(tmp_path/words[0]), *words[1:]]) == 2
        assert said in capsys.readouterr().err


def results(folder: Path, name: str, items: dict[str, list[float]], clusters=None) -> Path:
    (folder/name).mkdir(parents=True)
    lines = [dict(metric=m, item=str(n), value=float(v)) | ({} if clusters is None else dict(cluster=str(clusters[n]))) for m, values in items.items() for n, v in enumerate(values)]
    write_jsonl(folder/name/"items.jsonl", lines)
    return write_json(folder/name/"result.json", dict(metrics={m: float(np.mean(v)) for m, v in items.items()}, standard_errors={}))


def test_items_are_compared_by_the_test_that_fits(tmp_path):
    rng = np.random.default_rng(0)
    right, loss, groups = rng.random((2, 200)) < [[.8], [.6]], rng.normal(size=(2, 200)), np.arange(200) // 4
    a, b = (results(tmp_path, n, dict(right=right[i], loss=loss[i])) for i, n in enumerate("ab"))
    found = {f.metric: f for f in compared_sides([a], [b], None)}
    wins, losses = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    assert found["right"].method == "mcnemar" and found["right"].p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    assert found["right"].difference == pytest.approx(right[0].mean() - right[1].mean()) and found["right"].effect == pytest.approx((wins - losses)/(wins + losses))
    theirs = stats.bootstrap((loss[0] - loss[1],), np.mean, n_resamples=4999, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert found["loss"].method == "paired bootstrap" and (found["loss"].low, found["loss"].high) == pytest.approx(tuple(theirs), abs=.02)
    assert not found["loss"].sure and "chance alone would do" in paired_text(found["loss"]) and found["right"].sure
    c, d = (results(tmp_path, n, dict(right=right[i]), groups) for i, n in enumerate("cd"))
    assert compared_sides([c], [d], None)[0].method == "paired bootstrap" and compared_sides([c], [d], None)[0].n == 50    # clusters: no coin tosses


def test_seeds_are_compared_by_t(tmp_path):
    values = np.random.default_rng(1).normal(size=(2, 4))
    a, b = ([results(tmp_path, f"{arm}-seed{s}", dict(loss=[values[i, s]])) for s in range(4)] for i, arm in enumerate("ab"))
    found, = compared_sides(a, b[::-1], "loss")                                                         # paired by seed, not by order
    theirs = stats.ttest_rel(*values)
    assert (found.p, found.low, found.high) == pytest.approx((theirs.pvalue, *theirs.confidence_interval())) and found.n == 4
    with pytest.raises(UserError, match="no seed in common"): compared_sides(a[:2], b[2:], "loss")


def test_a_real_run_is_explained(capsys, tmp_path):
    assert main(["explain", str(RUNS[0]/"result.json")]) == 0
    assert "docs/bits_per_byte is 2.6231, 95 % interval" in capsys.readouterr().out
    command = ["explain", str(RUNS[0]/"result.json"), "--against", str(RUNS[2]/"result.json"), "--metric", "facts/test_known/exact_match", "--output", str(tmp_path/"out")]
    assert main(command) == 0 and "McNemar" in capsys.readouterr().out and json.loads((tmp_path/"out"/"explain.json").read_text())["found"][0]["method"] == "mcnemar"
    assert main(["explain", str(STUDY/"plan.json")]) == 2 and "not a result that can be explained" in capsys.readouterr().err


def test_curves_of_a_real_study(tmp_path, capsys):
    found = losses_result([str(STUDY)], "loss", 1)
    assert {line["line"]: line["seeds"] for line in found["lines"]} == {"docs-16x16-1headx8": 2, "docs-16x16-4headsx8": 2}
    for line in found["lines"]:
        own = np.array([run["loss"] for run in line["runs"]])
        assert np.allclose(line["mean"], own.mean(0)) and line["runs"][0]["tokens"] == line["tokens"]
        low, high = stats.t.interval(.95, 1, own.mean(0), stats.sem(own, axis=0))
        assert np.allclose(line["low"], low) and np.allclose(line["high"], high)
    lines = (RUNS[0]/"metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"metrics.jsonl").write_text("".join(lines[:6] + lines[4:7] + lines[9:]))
    curve = read_curve(tmp_path/"run")
    assert len(curve.restarts) == 1 and len(curve.gaps) == 1 and len(curve.tokens) == len(lines) - 2
    assert main(["losses", f"a={RUNS[0]}", f"a={tmp_path/'run'}", "--output", str(tmp_path/"out")]) == 0
    assert "lacks lines between" in capsys.readouterr().out and (tmp_path/"out"/"losses.png").stat().st_size > 5000
    assert "was restarted at" in (tmp_path/"out"/"losses.html").read_text()
    assert main(["losses", str(tmp_path), "--output", str(tmp_path/"no")]) == 2 and not (tmp_path/"no").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("why")/"good", load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    for part in (PeerMLAForCausalLM(facts_config(len(tokenizer), 32)), tokenizer): part.save_pretrained(folder)
    return folder


def _edit(folder: Path, change):
    weights = load_file(folder/"model.safetensors")
    change(weights)
    save_file({n: w.contiguous() for n, w in weights.items()}, folder/"model.safetensors")


HURT = {   # question -> what is done to a good folder
    "missing": lambda f: _edit(f, lambda w: w.pop("model.norm.weight")),
    "unexpected": lambda f: _edit(f, lambda w: w.update(extra=torch.ones(1))),
    "shapes": lambda f: _edit(f, lambda w: w.update({"model.norm.weight": torch.ones(3)})),
    "formats": lambda f: _edit(f, lambda w: w.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)})),
    "tied weights": lambda f: (f/"config.json").write_text(json.dumps(json.loads((f/"config.json").read_text()) | dict(tie_word_embeddings=True))),
    "files": lambda f: (f/"model.safetensors").rename(f/"model-1.safetensors") and (f/"model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict.fromkeys(load_file(f/"model-1.safetensors"), "model-1.safetensors") | {"a": "model-2.safetensors"}))),
    "tokenizer": lambda f: (f/"tokenizer.json").write_text("{")}


@pytest.mark.parametrize("question", QUESTIONS)
def test_each_reason_is_found_and_no_other(good, tmp_path, question, capsys):
    assert not any(reasons(good, good).values())
    folder = tmp_path/"hurt"
    shutil.copytree(good, folder)
    HURT[question](folder)
    assert [q for q, words in reasons(folder, folder).items() if words] == [question]
    code = main(["checkpoint", str(folder), "--why", str(folder)])
    assert question in ("unexpected", "formats") or code == 1
    assert list(QUESTIONS) == [line.split(":")[0][2:].strip() for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]


# ---- files that others have left --------------------------------------------------------------------------------------

def refused(words: list, capsys) -> str:
    "What a command says that refuses, in one line"
    capsys.readouterr()
    assert main(list(map(str, words))) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("peer-analyze: error: ") and "\n" not in said, said
    return said


@pytest.mark.parametrize("content, said", [
    ('{"kind": "recall", "groups": [{"split": "test"}]}', "lacks what such a file has"), ('{"kind": "perplexity", "texts": {"a": {"bits_per_byte": "x"}}}', "lacks what such a file has"),
    ('{"kind": "recall", "groups": 3}', "lacks what such a file has"), ('{"schema": "peer-analyze attention 1"}', "lacks what such a file has"),
    ('[1]', "not a result that can be explained"), ('{"kind": "rec', "not a JSON file")])
def test_a_result_of_another_shape_is_refused_by_its_name(content, said, tmp_path, capsys):
    (file := tmp_path/"recall.json").write_text(content)
    answer = refused(["explain", file], capsys)
    assert str(file) in answer and said in answer
    refused(["explain", file, "--against", file], capsys)


@pytest.mark.parametrize("kind", ["attention", "losses", "usage", "routing", "keys", "parameters", "ablate"])
def test_a_page_of_a_result_that_was_cut_is_refused_by_its_name(kind, tmp_path, capsys):
    write_json(file := tmp_path/"result.json", dict(schema=f"peer-analyze {kind} 1", source=["a"], complete=True, versions={}))
    assert str(tmp_path) in refused(["page", file], capsys)


@pytest.mark.parametrize("lines, status, said", [
    (["3"], "{}", "3 is no line of metrics"), (['{"tokens": "abc", "loss": 1}'], "{}", "tokens is 'abc', no number"), (['{"tokens": 1,', "{}"], "{}", "line 1 is not JSON")])
def test_a_log_of_another_shape_is_refused_by_its_name(lines, status, said, tmp_path, capsys):
    (tmp_path/"metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert said in refused(["losses", tmp_path, "--output", tmp_path/"out"], capsys) and not (tmp_path/"out").exists()


@pytest.mark.parametrize("status", ["[1]", '{"attempt": "x"}', '{"att', '{"attempt": null}'])
def test_a_damaged_status_hides_no_curve(status, tmp_path):
    (tmp_path/"metrics.jsonl").write_text("".join(json.dumps(dict(tokens=n, loss=True if n == 2 else 9 - n)) + "\n" for n in range(1, 5)))
    (tmp_path/"status.json").write_text(status)
    curve = read_curve(tmp_path)
    assert (curve.attempts, curve.tokens, curve.broken) == (1, [1, 3, 4], [2])


def test_salvage_writes_over_nothing_and_changes_no_spelling(tmp_path, capsys):
    (torn := tmp_path/"torn.json").write_text('{"a": {"x": 0.10,\n "y": [1e2, 1e999, "\\ud83d"]}, "b": 12')
    for _ in range(2): assert main(["salvage", str(torn)]) == 0    # the same again is no other file
    assert (tmp_path/"torn.salvaged.jsonl").read_text() == '{"path": ["a"], "value": {"x": 0.10,  "y": [1e2, 1e999, "\\ud83d"]}}\n'
    (mine := tmp_path/"mine.txt").write_text("mine")
    for place in (mine, tmp_path, "/dev/null"): assert "is there already" in refused(["salvage", torn, "--output", place], capsys)
    assert mine.read_text() == "mine" and not Path("/dev/null").is_file()


LONG = "x"*300
TYPED = { # a mistake of a command line, and what is said; before the work where that can be known
    "salvage to a name too long": (["salvage", "torn.jsonl", "--output", LONG], "cannot be written: File name too long"),
    "retrievals to a name too long": (["retrievals", "model", "q.jsonl", "--output", LONG], "cannot be written: File name too long"),
    "retrievals over another file": (["retrievals", "model", "q.jsonl", "--output", "torn.jsonl"], "is there already, and holds no retrievals"),
    "an edited model to a name too long": (["intervene", "model", "q.jsonl", "--drop", "1", "--save", LONG], "cannot be written: File name too long"),
    "an edited model over another": (["intervene", "model", "q.jsonl", "--drop", "1", "--save", "model"], "is there already"),
    "a converted model to a name too long": (["convert", "model", LONG], "cannot be written: File name too long"),
    "splits of a file": (["swap", "model", "q.jsonl", "--splits", "x"], "has no splits"),
    "an output that is a file": (["swap", "model", "q.jsonl", "--output", "q.jsonl"], "not a folder that can be written to"),
    "an empty answer": (["intervene", "model", "q.jsonl", "--drop", "1", "--want", ""], "an empty answer can't be wanted"),
    "a position that no question has": (["intervene", "model", "q.jsonl", "--drop", "1", "--at", "999"], "no question has this position"),
    "edits that are not UTF-8": (["intervene", "model", "q.jsonl", "--edits", "latin.yaml"], "not a UTF-8 text file (byte 14)"),
    "an aim that is no list": (["intervene", "model", "q.jsonl", "--edits", "aim.yaml"], "aim: 7 is no list of ids"),
    "an aim that is text": (["intervene", "model", "q.jsonl", "--edits", "text.yaml"], "aim: 'q1' is no list of ids"),
    "a fact that is none": (["rewrite", "model", "q.jsonl", "--aim", "nobody", "--want", "12", "--output", "new/deep"], "--aim nobody: no such question"),
    "a window too long": (["attention", "model", "q.jsonl", "--window", "97", "--output", "new/deep"], "give --window 96 or less"),
    "a text that is not there": (["usage", "model", "--files", "none.txt", "--output", "new/deep"], "none.txt"),
    **{f"a layer that is none for {name}": ([name, "model", "q.jsonl", option, "7", *more, "--output", "new/deep"], "layer 7 is none of the memory layers") for name, option, *more in (
        ("ablate", "--layers"), ("swap", "--layer"), ("routing", "--layers"), ("keys", "--layers"), ("intervene", "--layer", "--drop", "1"), ("rewrite", "--layer", "--aim", "q1", "--want", "12"), ("retrievals", "--layers"))},
    "one id for two questions": (["intervene", "model", "same.jsonl", "--drop", "1"], "the id a is there 2 times"),
    "an end that is no text": (["intervene", "model", "end.jsonl", "--drop", "1"], "line 1: end is 3, not text"),
    "half a character": (["intervene", "model", "half.jsonl", "--drop", "1"], "line 1 has half a character"),
    "a run that is counted twice": (["losses", "run", "run"], "is given twice"),
    "a result that is counted twice": (["explain", "result.json", "result.json"], "is given twice on one side"),
    "features that fail": (["keys", "model", "q.jsonl", "--permutations", "19", "--features", "features.py:fails"], "cannot be computed: KeyError"),
    "features that are no numbers": (["keys", "model", "q.jsonl", "--permutations", "19", "--features", "features.py:words"], "one finite number each is needed")}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "A model, and files of all kinds"
    folder, tokenizer = tmp_path_factory.mktemp("typed"), load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    torch.manual_seed(0)
    for part in (PeerMLAForCausalLM(facts_config(len(tokenizer), 96, hidden_size=16, num_hidden_layers=2, memory_layers=[0, 1])).eval(), tokenizer): part.save_pretrained(folder/"model")
    lines = {"q": [dict(id=f"q{n}", prompt=f"Ann {n}:", answer=f" {n*37 % 100:02d}") for n in range(6)], "same": [dict(id="a", prompt="b:", answer="c")]*2, "end": [dict(prompt="a:", answer="b", end=3)]}
    for name, rows in lines.items(): write_jsonl(folder/f"{name}.jsonl", rows)
    write_json(folder/"result.json", dict(metrics={"a/loss": 1.5}, standard_errors={}))
    (folder/"half.jsonl").write_text(json.dumps(dict(prompt="x \ud83d:", answer="y")) + "\n")
    (folder/"torn.jsonl").write_text('{"a": 1}\n{"b": 2')
    (folder/"latin.yaml").write_bytes(b"- {drop: 1} # \xff\n")
    for name, aim in (("aim", "7"), ("text", "q1")): (folder/f"{name}.yaml").write_text(f"edits: [{{drop: 1}}]\naim: {aim}\n")
    (folder/"features.py").write_text("def fails(e): raise KeyError('z')\ndef words(e): return dict(a=['x']*len(e))\n")
    (folder/"run").mkdir()
    write_jsonl(folder/"run"/"metrics.jsonl", [dict(tokens=n, loss=9 - n) for n in range(1, 6)])
    return folder


@pytest.mark.parametrize("words, said", TYPED.values(), ids=TYPED.keys())
def test_what_cannot_be_meant_is_one_line_and_changes_nothing(words, said, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    before = {path: path.read_bytes() for path in places.rglob("*") if path.is_file()}
    assert said in refused(words, capsys)
    assert {path: path.read_bytes() for path in before} == before and not (places/"new").exists()


def test_brackets_in_brackets_take_no_minutes():
    rest = salvage_document(b"["*60_000)
    assert not rest.records and rest.lost
