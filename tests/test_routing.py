"Where tokens go: estimates against libraries, runs that are killed, a million rows in bounded memory, real problems."
import json
import os
import shutil
import signal
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from children import in_child
from peer_nb.analysis import routing_records
from peer_nb.analysis.command import main
from peer_nb.analysis.consistency import asked_hop, planted, query_span
from peer_nb.analysis.information import cell_counts, information_of
from peer_nb.analysis.key_statistics import layer_keys
from peer_nb.analysis.pages import read_analysis, schema_of
from peer_nb.analysis.routed_documents import Document, document_tokens, read_documents
from peer_nb.analysis.routing import class_uses, heads_known
from peer_nb.analysis.specialised import layer_tests
from peer_nb.analysis.token_classes import CLASSES, character_classes, token_classes
from peer_nb.analysis.worked_example import facts_config
from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.data.masking import surfaces_of
from peer_nb.models.causal_lm import PeerMLAForCausalLM
from peer_nb.tasks.hashhop import hashhop
from peer_nb.tasks.writing import write_task

REAL = os.environ.get("PEER_NB_DATA")
TEXTS = [f"Ann has {n} pens and buys {n % 7}.\nShe has {n}+{n % 7} = {n + n % 7} pens." for n in range(24)]


def tokenizer(): return load_tokenizer(DatasetConfig(tokenizer_name="bytes"))


def small(seed: int = 0) -> PeerMLAForCausalLM:
    torch.manual_seed(seed)
    return PeerMLAForCausalLM(facts_config(len(tokenizer()), 96, hidden_size=32, num_hidden_layers=2, memory_layers=[0, 1])).eval()


def documents():
    surfaces = surfaces_of(tokenizer())
    return [document_tokens(Document(f"t/{n}", text, ((len(text) - 7, len(text) - 6),)), tokenizer(), surfaces, 96) for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in (small(), tokenizer()): part.save_pretrained(folder)
    return folder


def test_information_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels, keys = rng.integers(0, 5, 400), rng.integers(0, 30, (400, 3))
    ours = information_of(cell_counts(labels, keys, 5, 30), 3)["plugin"]
    assert ours == pytest.approx(metrics.mutual_info_score(np.repeat(labels, 3), keys.ravel())/np.log(2), abs=1e-12)


def test_the_correction_is_millers_where_a_token_has_one_row():
    rng = np.random.default_rng(1)
    counts = rng.poisson(1.2, (4, 20))
    cells, rows, classes = (counts > 0).sum(), (counts.sum(0) > 0).sum(), (counts.sum(1) > 0).sum()
    found = information_of(counts, 1)
    assert found["corrected"] - found["plugin"] == pytest.approx((rows + classes - cells - 1)/(2*counts.sum()*np.log(2)), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="aé9½ .,-+%'\n_≤", max_size=24))
def test_bytes_of_a_character_have_its_class(text):
    classes, straddling = token_classes(np.frombuffer(text.encode(), np.uint8).astype(int), surfaces_of(tokenizer()))
    assert classes.tolist() == np.repeat(character_classes(text), [len(c.encode()) for c in text]).tolist() and not straddling.any()


def test_a_planted_document_has_new_names_and_nothing_else_new():
    first, second = hashhop(num_samples=2, num_eval=0, n_chars=80, num_queries=2, lengths=[6], hops=[2])["train"]["text"]
    (a, b), (own, hop) = asked_hop(first), asked_hop(second)
    found = planted(first, second)
    assert found["unrelated"] == second
    assert {relation: asked_hop(text) for relation, text in found.items()} == dict(unrelated=(own, hop), hash=(a, hop), hop=(a, b), prefix=(a[:3] + own[3:], hop))
    assert found["hop"].replace(a, own).replace(b, hop) == second and len(found["prefix"]) == len(second)
    assert second[slice(*query_span(second))] == f"{own} = '"
    assert planted(first, first) is None    # its names are taken


def killed(folder: str) -> None:
    "Write three parts, and die while the fourth is written"
    routing_records.parts_of = partial(routing_records.parts_of, most=300)
    write = routing_records.write_part
    def part(path, columns, about):
        if path.name == "part-00003.parquet":
            path.with_name(f".{path.name}.0.tmp").write_bytes(b"PAR1 torn")
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, columns, about)
    routing_records.write_part = part
    routing_records.write_records(small(), documents(), Path(folder), weights=True)


def test_a_killed_run_goes_on_behind_its_last_part(tmp_path, monkeypatch):
    for name in ("cut", "whole"): (tmp_path/name).mkdir()
    in_child(killed, str(tmp_path/"cut"), ends=-signal.SIGKILL)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/"cut").glob("part-*")}
    assert sorted(before) == [f"part-{n:05}.parquet" for n in range(3)]
    monkeypatch.setattr(routing_records, "parts_of", partial(routing_records.parts_of, most=300))
    cut, whole = (routing_records.write_records(small(), documents(), tmp_path/name, weights=True) for name in ("cut", "whole"))
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path/"cut").glob("part-*") if p.name in before} == before
    assert not list((tmp_path/"cut").glob(".part*")) and cut.count == whole.count > 4
    assert cut.documents == whole.documents
    for layer in (0, 1):
        for what in ("keys", "weights"): assert all(np.array_equal(a, b) for a, b in zip(cut.each(layer, what), whole.each(layer, what)))


class Million:
    "Records of a layer with a million rows that were never run"
    layers = {0: dict(heads=2, k=16, rows=2**20, sizes=[1024, 1024])}
    documents = [dict(id=str(n), groups={}, asked="", tokens=200) for n in range(100)]
    def column(self, name): return np.repeat(np.arange(100), 80) if name == "document" else np.random.default_rng(1).integers(0, 5, 8000)
    def each(self, layer, what="keys"):
        rng = np.random.default_rng(0)
        for _ in range(2): yield (rng.pareto(.3, (4000, 2, 16)) * 1000 % 2**20).astype(np.int32) if what == "keys" else rng.random((4000, 2, 16)).astype(np.float32)


def test_a_million_rows_need_a_few_hundred_megabytes(tmp_path):
    records, labels = Million(), Million().column("classes")
    tracemalloc.start()
    found = heads_known(records, dict(types=(labels, CLASSES)), 2, 0, tmp_path/"log.jsonl")
    tests, uses = layer_tests(records, 0, labels, 6), class_uses(records, labels, CLASSES)
    keys, _ = layer_keys(records, 0, labels >= 0, 5.)
    most = tracemalloc.get_traced_memory()[1]/1e6
    tracemalloc.stop()
    assert len(found) == 2 and len(tests["row"]) > 100 and len(uses) == 5 and keys["retrieved"] > 50_000
    assert most < 400, f"{most:.0f} MB"


def run(capsys, *words) -> tuple[int, str, str]:
    try: code = main([str(w) for w in words])
    except SystemExit as e: code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_both_commands_leave_what_their_schemas_say(checkpoint, tmp_path, capsys):
    jsonschema = pytest.importorskip("jsonschema")
    write_task("synthetic_qa", tmp_path/"qa", num_pairs=40)
    (tmp_path/"notes.txt").write_text("\n\n".join(TEXTS))
    assert run(capsys, "keys", checkpoint, tmp_path/"qa", "--limit", 12, "--permutations", 19, "--output", tmp_path/"k")[0] == 0
    assert run(capsys, "routing", checkpoint, tmp_path/"notes.txt", "--permutations", 19, "--window", 40, "--output", tmp_path/"r")[0] == 0
    for kind, folder in (("keys", tmp_path/"k"), ("routing", tmp_path/"r")):
        found = read_analysis(folder/f"{kind}.json")
        assert found[0] == kind
        jsonschema.validate(found[1], schema_of(kind))
        page = (folder/f"{kind}.html").read_text()
        assert "http" not in page and ("cut off" in page) == (kind == "routing")
        assert run(capsys, "page", folder/f"{kind}.json", "--output", tmp_path/"again")[0] == 0
        assert (tmp_path/"again"/f"{kind}.html").exists() and not (folder/"records").exists()


def test_a_second_start_repeats_nothing_and_another_question_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path/"notes.txt").write_text("\n\n".join(TEXTS[:8]))
    asked = ["routing", checkpoint, tmp_path/"notes.txt", "--permutations", 19, "--keep-records", "--output", tmp_path/"r"]
    assert run(capsys, *asked)[0] == 0
    first = (tmp_path/"r"/"routing.json").read_bytes()
    monkeypatch.setattr(routing_records, "part_columns", lambda *a: pytest.fail("the model was run again"))
    assert run(capsys, *asked)[0] == 0 and (tmp_path/"r"/"routing.json").read_bytes() == first
    code, _, err = run(capsys, *asked, "--seed", 1)
    assert code == 2 and "another run" in err and (tmp_path/"r"/"routing.json").read_bytes() == first


def test_problems_without_an_answer_are_named(checkpoint, tmp_path, capsys):
    rows = [dict(question="How many?", answer="#### 3"), dict(question="And now?"), dict(question="Then?", answer="Four")]
    (tmp_path/"gsm.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    code, _, err = run(capsys, "routing", checkpoint, tmp_path/"gsm.jsonl", "--output", tmp_path/"out")
    assert (code, err.count("\n"), (tmp_path/"out").exists()) == (2, 1, False) and "line 2, line 3" in err
    code, _, err = run(capsys, "routing", checkpoint, tmp_path/"gsm.jsonl", "--limit", 1, "--layers", 7, "--output", tmp_path/"out")
    assert code == 2 and "none of the memory layers: 0, 1" in err and not (tmp_path/"out").exists()


@pytest.mark.skipif(not REAL, reason="PEER_NB_DATA is not set to a folder with gsm8k")
def test_all_problems_of_gsm8k_have_their_answers():
    found = read_documents("gsm8k")
    assert len(found) == 7473
    for d in found[:500]: assert d.text[slice(*d.answers[0])].replace(",", "").lstrip("-").replace(".", "").isdigit()


def test_check_names_the_first_shape_that_does_not_fit(checkpoint, tmp_path, capsys):
    code, out, err = run(capsys, "checkpoint", checkpoint, "--check", "--output", tmp_path/"fits")
    assert (code, err) == (0, "") and "tensors fit" in out and "1 x 5 x 32 -> 1 x 5 x" in out
    pytest.importorskip("jsonschema").validate(read_analysis(tmp_path/"fits"/"check.json")[1], schema_of("check"))
    config = json.loads((checkpoint/"config.json").read_text())
    config["mla_config"]["kv_lora_rank"] = 24
    (tmp_path/"model").mkdir()
    (tmp_path/"model"/"config.json").write_text(json.dumps(config))
    shutil.copy(checkpoint/"model.safetensors", tmp_path/"model")
    code, _, err = run(capsys, "checkpoint", tmp_path/"model", "--check")
    assert code == 2 and err.count("\n") == 1
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight: expected [32, 32], found [40, 32]; change mla_config.kv_lora_rank: 24 -> 32, and everything fits" in err


def test_check_knows_the_layout_of_another_library(checkpoint, tmp_path, capsys):
    peer = pytest.importorskip("PEER_pytorch").PEER(dim=32, heads=2, num_experts=64, num_experts_per_head=4, dim_key=8)
    torch.save(peer.state_dict(), tmp_path/"peer.pt")
    (tmp_path/"model.yaml").write_text("model_config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 64, vocab_size: 260, memory_layers: [1]}\n")
    code, _, err = run(capsys, "checkpoint", tmp_path/"peer.pt", "--check", "--config", tmp_path/"model.yaml")
    assert code == 2 and err.count("\n") == 1 and "PEER-pytorch" in err
