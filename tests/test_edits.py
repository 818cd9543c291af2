"Edits of memories against models whose tables were changed, and against layers that are written out by hand."
import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_interventions import all_scores, asked, encoded, small  # noqa: F401  a fixture is a name too

from peer_nb.analysis.ablation import layer_answers
from peer_nb.analysis.command import main
from peer_nb.analysis.edits import asked_under, edit_effects, editing, judged, of_one_length, parse_edits, pattern_keys
from peer_nb.analysis.hooks import reading
from peer_nb.analysis.interventions import answers_of
from peer_nb.analysis.rewriting import rewrite_rows
from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.recall import Encoded, Question, encode_questions
from peer_nb.models.causal_lm import PeerMLAForCausalLM

LAYER, I, J = 1, 3, 11


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    "A checkpoint that was never trained, and what it says to some questions, in digits: it knows all of these answers"
    folder, tokenizer, model = tmp_path_factory.mktemp("sure"), load_tokenizer(DatasetConfig(tokenizer_name="bytes")), small(memory_kind="pkm")
    digits = tokenizer("0123456789", add_special_tokens=False)["input_ids"]
    with torch.no_grad(): model.lm_head.weight[[i for i in range(260) if i not in digits]] = 0
    with torch.no_grad(): model.model.layers[1].memory.values.weight *= 6     # the memory decides
    for part in (model, tokenizer): part.save_pretrained(folder/"checkpoint")
    asked = [e for e in encode_questions(tokenizer, [Question(f"q/{n}", "q", f"{n}:", "00", "") for n in range(10, 26)])]
    lines = [dict(id=e.question.id, prompt=e.question.prompt, answer=tokenizer.decode(generated(model, e))) for e in asked]
    (folder/"data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder/"checkpoint", folder/"data.jsonl"


def said_of_row(layer, x, row):
    "What a row says to each token, from the tables: [tokens, d]"
    if "values" in layer.table_names:
        value = layer.values.weight[row].expand(len(x), -1)
        return layer.read(x, torch.ones(len(x), 1, dtype=x.dtype), torch.full((len(x), 1), row)) if type(layer).__name__ == "MemoryPlus" else value
    down, up = layer.expert_down.weight[row], layer.expert_up.weight[row]
    return torch.nn.functional.gelu(x @ down)[:, None] * up


def places(at, length, begin):
    "Positions of a row, by reading the rule aloud"
    if at == "all": return [*range(length)]
    if at == "answer": return [*range(begin - 1, length)]
    return [p for p in [at if at >= 0 else begin + at] if 0 <= p < length]


class by_hand:
    "A layer whose forward is written out: routed by hand, then each slot of each token looked at in a loop"
    def __init__(self, model, edit, begin): self.layer, self.edit, self.begin = model.model.layers[LAYER].memory, edit, begin
    def __exit__(self, *_): del self.layer.forward
    def __enter__(self):
        layer, e, begin = self.layer, self.edit, self.begin
        def forward(x, mask=None):
            weights, index = (t.unflatten(0, x.shape[:2]).clone() for t in layer.route(x.flatten(0, 1)))
            more = torch.zeros_like(x)
            for row in range(x.shape[0]):
                for at in places(e.at, x.shape[1], begin):
                    for head in range(layer.num_heads) if e.head is None else [e.head]:
                        w, i = weights[row, at, head], index[row, at, head]
                        if e.edit == "pattern":
                            scores, query = all_scores(layer, x[row, at][None])
                            scores = scores[0, head].clone()
                            scores[e.rows[0]] = query[0, head] @ pattern_keys(layer, e)[head]
                            best, chosen = scores.topk(layer.top_k)
                            w.copy_(best.softmax(-1)), i.copy_(chosen)
                        for slot in range(len(i)):
                            if e.edit == "drop" and i[slot] == e.rows[0]: w[slot] = 0
                            elif e.edit == "swap" and i[slot] in e.rows: i[slot] = e.rows[1 - e.rows.index(int(i[slot]))]
                            elif e.edit == "replace" and len(e.rows) == 2 and i[slot] == e.rows[1]: i[slot] = e.rows[0]
                        if e.edit == "replace" and len(e.rows) == 1:
                            first, there = int(w.argmax()), (i == e.rows[0]).nonzero().flatten().tolist()
                            if there: i[there[0]] = int(i[first])
                            i[first] = e.rows[0]
                    if e.edit == "inject": more[row, at] = e.weight * said_of_row(layer, x[row, at][None], e.rows[0])[0]
            flat = layer.read(x.flatten(0, 1), weights.flatten(0, 1).flatten(1), index.flatten(0, 1).flatten(1))
            return flat.view(x.shape) + more
        layer.forward = forward


EDITS = [dict(drop=I), dict(swap=[I, J]), dict(replace=J, in_place_of=I), dict(replace=J), dict(replace=J, head=1), dict(inject=J, weight=1.5),
         dict(pattern=I, key="zeros"), dict(pattern=I, key="ones"), dict(pattern=I, key="random"), dict(pattern=I, key=[.5]*8)]


@pytest.mark.parametrize("kind", ["peer", "pkm", "memory_plus"])
def test_every_edit_equals_a_layer_written_out(kind, encoded):
    model = small(memory_kind=kind)
    moved = 0
    batch = max(of_one_length(encoded), key=len)
    begin = len(batch[0].context)
    clean = asked_under(model, batch)[0]
    assert clean == pytest.approx([p for p, _ in asked(model, batch)], abs=1e-9)
    for line in EDITS:
        for at in ("all", "answer", -1, -2, 0, begin) if "inject" in line else ("all", -1):
            chain = parse_edits([line | dict(at=at)], LAYER)
            found = asked_under(model, batch, chain)[0]
            with by_hand(model, chain[0], begin): truth = [p for p, _ in asked(model, batch)]
            assert found == pytest.approx(truth, abs=1e-9), (line, at)
            moved += found != pytest.approx(clean, abs=1e-9)
    assert moved > 12


def test_patterns_are_as_long_as_the_key_and_zeros_score_nothing(encoded):
    layer = small().model.layers[LAYER].memory
    own = torch.stack([torch.cat([layer.sub_keys[h, I // 4], layer.sub_keys[h, 4 + I % 4]]) for h in range(2)])
    ones, random, zeros = (pattern_keys(layer, parse_edits([dict(pattern=I, key=key)], LAYER)[0]) for key in ("ones", "random", "zeros"))
    assert torch.allclose(ones.norm(dim=-1), own.norm(dim=-1)) and torch.allclose(random.norm(dim=-1), own.norm(dim=-1)) and not zeros.any()
    assert (ones == ones[:, :1]).all()


@torch.no_grad()
def test_each_row_of_a_batch_has_edits_of_its_own_and_chains_act_together(encoded):
    model = small(memory_kind="pkm")
    batch = next(b for b in of_one_length(encoded) if len(b) > 1)[:1]
    chains = [[], parse_edits([dict(drop=I)], 1), parse_edits([dict(swap=[I, J]), dict(inject=7, layer=2, at=-1)], 1)]
    alone = [asked_under(model, batch, chain)[0][0] for chain in chains]
    rows = answers_of(batch*3)
    with editing(model, chains, torch.tensor([len(batch[0].context)]*3)): logits = model(rows.ids).logits
    logp = logits.gather(1, rows.place[..., None].expand(-1, -1, logits.shape[-1])).log_softmax(-1)
    assert logp.gather(-1, rows.target[..., None])[..., 0].sum(-1).tolist() == pytest.approx(alone, abs=1e-9)
    assert len({round(p, 9) for p in alone}) == 3


def generated(model, e: Encoded) -> list[int]:
    "transformers' own greedy generation"
    ids = torch.tensor([e.context])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(e.answer), do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(e.context):].tolist()


def test_efficacy_and_collateral_are_those_of_the_saved_checkpoint(sure, tmp_path, capsys):
    "Answers of the reloaded checkpoint, generated by transformers, against what the command says"
    checkpoint, data = sure
    first = load_file(checkpoint/"model.safetensors")
    assert main(["ablate", str(checkpoint), str(data), "--layers", "1", "--output", str(tmp_path/"a")]) == 0
    effects = [json.loads(line) for line in (tmp_path/"a"/"effects.jsonl").read_text().splitlines()]
    *gone, other, last = [k["key"] for k in json.loads((tmp_path/"a"/"ablate.json").read_text())["keys"]][:4]
    (tmp_path/"chain.yaml").write_text(yaml.safe_dump(dict(layer=1, edits=[*(dict(drop=row) for row in gone), dict(swap=[other, last])])))
    words = [str(checkpoint), str(data), "--edits", str(tmp_path/"chain.yaml"), "--save", str(tmp_path/"edited"), "--output", str(tmp_path/"out")]
    assert main(["intervene", *words]) == 0
    found = json.loads((tmp_path/"out"/"intervene.json").read_text())
    assert "What the edits do" in (tmp_path/"out"/"index.html").read_text()
    table = "model.layers.1.memory.values.weight"
    after = load_file(tmp_path/"edited"/"model.safetensors")
    assert not after[table][gone].any() and torch.equal(after[table][[other, last]], first[table][[last, other]])
    assert [n for n in first if not torch.equal(first[n], after[n])] == [table]
    assert [e["edit"] for e in json.loads((tmp_path/"edited"/"edits.json").read_text())] == ["drop"]*2 + ["swap"]
    model = PeerMLAForCausalLM.from_pretrained(tmp_path/"edited", dtype=torch.float64).eval()
    questions = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    known = {e.question.id: e for e in encode_questions(tokenizer, [Question(q["id"], "q", q["prompt"], q["answer"], "") for q in questions])}
    assert {a["id"] for a in found["answers"]} == {*known}
    for answer in found["answers"]: assert answer["said"] == generated(model, known[answer["id"]])
    lost = {side: [a["said"] != known[a["id"]].answer for a in found["answers"] if a["aimed"] is side] for side in (True, False)}
    assert any(lost[True] + lost[False])
    for name, side in (("efficacy", True), ("collateral", False)):
        share = found["curve"][0][name]
        assert share["n"] == len(lost[side]) and share["value"] == (sum(lost[side]) / len(lost[side]) if lost[side] else None)
    best = {}
    for e in effects: best[e["id"]] = min(best.get(e["id"], e), e, key=lambda r: r["delta_logprob"])
    aimed = {name for name, e in best.items() if e["key"] in (*gone, other, last)}
    assert aimed == {*found["aim"]}


def memory_outputs(model, encoded) -> list:
    "What the memory says to each question and its answer, asked one by one"
    said, memory = [], model.model.layers[LAYER].memory
    hook = memory.register_forward_hook(lambda _, given, out: said.append(out[0]))
    with torch.no_grad():
        for e in encoded: model(torch.tensor([e.context + e.answer[:-1]]))
    hook.remove()
    return said


def test_a_rewritten_checkpoint_says_what_was_wanted_and_only_its_rows_have_changed(sure, tmp_path, capsys):
    "Generated by the reloaded checkpoint; drift from the outputs of both checkpoints' memories"
    checkpoint, data = sure
    tokenizer, questions = load_tokenizer(DatasetConfig(tokenizer_name="bytes")), [json.loads(line) for line in data.read_text().splitlines()]
    known = encode_questions(tokenizer, [Question(q["id"], "q", q["prompt"], q["answer"], "") for q in questions])
    want = next(q["answer"] for q in questions if q["answer"] != questions[0]["answer"])
    words = [str(checkpoint), str(data), "--layer", "1", "--aim", questions[0]["id"], "--want", want]
    assert main(["rewrite", *words, "--rows", "2", "12", "--save", str(tmp_path/"new"), "--output", str(tmp_path/"out")]) == 0
    found, table = json.loads((tmp_path/"out"/"rewrite.json").read_text()), "model.layers.1.memory.values.weight"
    first, after = (load_file(place/"model.safetensors") for place in (checkpoint, tmp_path/"new"))
    assert [n for n in first if not torch.equal(first[n], after[n])] == [table]
    assert (first[table] != after[table]).any(1).nonzero()[:, 0].tolist() == sorted(found["rows"]) and len(found["rows"]) <= 12
    old, new = (PeerMLAForCausalLM.from_pretrained(place, dtype=torch.float64).eval() for place in (checkpoint, tmp_path/"new"))
    assert [found["curve"][n]["efficacy"]["value"] for n in (0, 1)][-1] == 1 and tokenizer.decode(generated(new, known[0])) == want
    lost = [generated(new, e) != e.answer for e in known[1:]]
    assert found["curve"][1]["collateral"]["value"] == sum(lost)/len(lost)
    drift = sum((a - b).square().sum().item() for a, b in zip(memory_outputs(old, known[1:]), memory_outputs(new, known[1:])))
    assert found["curve"][1]["drift"] == pytest.approx(drift, rel=1e-3) and drift > 0
    assert json.loads((tmp_path/"new"/"edits.json").read_text())[0]["rows"] == found["rows"]
    for more, said in ((["--aim", "nobody", "--want", want], "no such question"), (["--layer", "0"], "layer 0 is none of"), (["--save", str(tmp_path/"new")], "is not empty")):
        capsys.readouterr()
        assert main(["rewrite", *words, "--rows", "1", "--output", str(tmp_path/"none"), *more]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1 and not (tmp_path/"none").exists()


@pytest.mark.parametrize("kind", ["peer", "pkm", "memory_plus"])
def test_keeping_more_changes_less_and_the_rest_of_a_table_stays(kind, encoded):
    "Log-probabilities of the changed model, asked plainly; with a prohibitive price nothing moves"
    found = {}
    for keep in (0., 1e9):
        model = small(memory_kind=kind)
        table = getattr(model.model.layers[LAYER].memory, model.model.layers[LAYER].memory.table_names[-1]).weight
        before, wanted = table.detach().clone(), replace(encoded[0], answer=encoded[4].answer)
        first = asked(model, [wanted])[0][0]
        done = rewrite_rows(model, encoded, LAYER, {encoded[0].question.id: wanted.answer}, most=6, keep=keep)
        assert asked(model, [wanted])[0][0] == pytest.approx(done.logprob, abs=1e-9)
        assert {*(table != before).any(1).nonzero()[:, 0].tolist()} <= {*done.rows.tolist()} and len(done.rows) == 6
        found[keep] = done.logprob - first, done.drift
    assert found[0.][0] > 1 and found[1e9][0] < .01*found[0.][0] and found[1e9][1] < 1e-6 < found[0.][1]


def test_judged_counts_what_it_says():
    def record(aimed, says): return dict(aimed=aimed, says=says, logprob_before=-1., logprob_after=-2.)
    records = [record(True, "wanted"), record(True, "none"), record(True, "own"), record(False, "own"), record(False, "other")]
    wanted, any_other = judged(records, True), judged(records, False)
    assert (wanted["efficacy"]["value"], any_other["efficacy"]["value"]) == (1/3, 2/3)
    assert wanted["collateral"]["value"] == .5 and wanted["change_aimed"] == dict(mean=-1, low=None, high=None, n=3)


@pytest.mark.parametrize("words, said", [
    (["--drop", "5000"], "rows 0 to 15"), (["--drop", "3", "--at", "900"], "no question has this position"), (["--drop", "3", "--layer", "0"], "layer 0 is none of the memory layers: 1, 2"), (["--drop", "3", "--swap", "1", "2"], "give one of"),
    (["--swap", "1"], "two row numbers"), (["--inject", "3"], "--aim"), (["--drop", "3", "--aim", "nobody"], "no such question"), (["--drop", "3", "--at", "end"], "all, answer or a position"),
    (["--edits", "{here}/bad.yaml"], "contradict each other"), (["--edits", "{here}/none.yaml"], "cannot be read"), (["--inject", "3", "--save", "{here}/saved"], "cannot be saved"),
    (["--drop", "3", "--head", "9"], "heads 0 to 1"), (["--edits", "{here}/word.yaml"], "doesn't know word")])
def test_mistakes_end_in_one_line_and_nothing_is_written(sure, tmp_path, capsys, words, said):
    checkpoint, data = sure
    (tmp_path/"bad.yaml").write_text("- drop: 3\n- swap: [3, 4]\n")
    (tmp_path/"word.yaml").write_text("word: 3\nedits: []\n")
    assert main(["intervene", str(checkpoint), str(data), "--output", str(tmp_path/"none"), *(w.format(here=tmp_path) for w in words)]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path/"none").exists() and not (tmp_path/"saved").exists()


@pytest.mark.parametrize("kind", ["peer", "pkm"])
@torch.no_grad()
def test_parts_of_a_layer_against_one_whose_weights_were_changed(kind, encoded):
    "A random router and values that changed places: what the layer says with other weights in it"
    model = small(memory_kind=kind)
    layer = model.model.layers[LAYER].memory
    with reading(model, [LAYER]) as seen: model(answers_of(encoded).ids)
    r = seen[LAYER]
    own, tables = layer.sub_keys.clone(), [getattr(layer, name).weight for name in layer.table_names]
    kept = [t.clone() for t in tables]
    rng = torch.Generator().manual_seed(7*4096 + LAYER)
    layer.sub_keys.copy_(torch.randn(own.shape, generator=rng, dtype=torch.float64) * own.std())
    other_router = layer(r.x)
    layer.sub_keys.copy_(own)
    assert torch.allclose(layer_answers(r, "keys", 7), other_router, atol=1e-12) and not torch.allclose(other_router, r.out, atol=1e-3)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(7*4096 + LAYER))
    for t, was in zip(tables, kept): t.copy_(was[order])
    other_values = layer(r.x)
    for t, was in zip(tables, kept): t.copy_(was)
    assert torch.allclose(layer_answers(r, "values", 7), other_values, atol=1e-12) and not torch.allclose(other_values, r.out, atol=1e-3)
    assert not layer_answers(r, "whole", 7).any()


def test_swaps_from_the_shell(sure, tmp_path, capsys):
    "The command as its help writes it: two arguments"
    checkpoint, data = sure
    assert main(["swap", str(checkpoint), str(data), "--facts", "3", "--output", str(tmp_path/"swaps")]) == 0
    found = json.loads((tmp_path/"swaps"/"swap.json").read_text())
    assert len(found["facts"]) == 3 and len(found["cells"]) == 6
    capsys.readouterr()
    assert main(["swap", str(checkpoint), str(data), "--layer", "0", "--output", str(tmp_path/"x")]) == 2
    err = capsys.readouterr().err
    assert "none of the memory layers: 1, 2" in err and err.count("\n") == 1 and not (tmp_path/"x").exists()


def test_agreement_of_swaps_with_ablation_and_co_retrieval_by_hand(sure, tmp_path):
    "Effects of each swap and each ablation in the tables themselves, overlaps by sets, correlations by scipy"
    from scipy.stats import spearmanr
    checkpoint, data = sure
    assert main(["swap", str(checkpoint), str(data), "--layer", "1", "--facts", "5", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path/"swap.json").read_text())
    assert "Swapped rows" in (tmp_path/"index.html").read_text()
    model, tokenizer = PeerMLAForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval(), load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    lines = {q["id"]: q for q in map(json.loads, data.read_text().splitlines())}
    facts = encode_questions(tokenizer, [Question(f["id"], "q", lines[f["id"]]["prompt"], f["answer"], "") for f in found["facts"]])
    rows, table = [f["row"] for f in found["facts"]], model.model.layers[1].memory.values.weight
    with reading(model, [1]) as seen, torch.no_grad(): model(answers_of(facts).ids)
    per = seen[1].index.view(len(facts), -1)
    retrieved = [{e for e in range(len(facts)) if row in per[e]} for row in rows]
    clean, swapped, kept, together = [p for p, _ in asked(model, facts)], {}, [], []
    with torch.no_grad():
        for n, row in enumerate(rows):
            was, table[row] = table[row].clone(), 0
            assert found["facts"][n]["ablated"] == pytest.approx(asked(model, facts)[n][0] - clean[n], abs=1e-9)
            table[row] = was
        for cell in found["cells"]:
            a, b = cell["asked"], cell["partner"]
            table[[rows[a], rows[b]]] = table[[rows[b], rows[a]]]
            assert cell["delta_logprob"] == pytest.approx(asked(model, facts)[a][0] - clean[a], abs=1e-9)
            table[[rows[a], rows[b]]] = table[[rows[b], rows[a]]]
            swapped.setdefault(a, []).append(cell["delta_logprob"])
    mean = [sum(swapped[a]) / len(swapped[a]) for a in range(len(facts))]
    assert found["agreement"]["ablation"]["value"] == pytest.approx(spearmanr(mean, [f["ablated"] for f in found["facts"]]).statistic)
    places = {(c["asked"], c["partner"]): c["own_places"] for c in found["cells"]}
    for a in range(len(facts)):
        for b in range(a):
            kept.append(sum(places[a, b] + places[b, a]) / len(places[a, b] + places[b, a]))
            together.append(len(retrieved[a] & retrieved[b]) / len(retrieved[a] | retrieved[b]))
    value = found["agreement"]["co_retrieval"]["value"]
    if len({*kept}) > 1 and len({*together}) > 1: assert value == pytest.approx(spearmanr(kept, together).statistic)
    else: assert value is None
    same = [f["cluster"] for f in found["facts"]]
    for (a, b), right in places.items(): assert same[a] != same[b] or all(right)


def test_retrievals_in_a_file_are_those_of_a_plain_forward_pass(sure, tmp_path):
    import pandas as pd
    checkpoint, data = sure
    assert main(["retrievals", str(checkpoint), str(data), "--output", str(tmp_path/"new"/"r.parquet"), "--limit", "3", "--batch-tokens", "8"]) == 0
    table = pd.read_parquet(tmp_path/"new"/"r.parquet")
    model, tokenizer = PeerMLAForCausalLM.from_pretrained(checkpoint).eval(), load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    lines = [json.loads(line) for line in data.read_text().splitlines()][:3]
    for q, e in zip(lines, encode_questions(tokenizer, [Question(q["id"], "q", q["prompt"], q["answer"], "") for q in lines])):
        with reading(model, [1, 2]) as seen, torch.no_grad(): model(torch.tensor([e.context + e.answer[:-1]]))
        for layer in (1, 2): assert table[(table.id == q["id"]) & (table.layer == layer)].key.tolist() == seen[layer].index.flatten().tolist()
    assert main(["retrievals", str(checkpoint), str(data), "--output", str(tmp_path/"no"/"r.parquet"), "--layers", "0"]) == 2 and not (tmp_path/"no").exists()


def test_a_text_in_bits_per_byte(sure, tmp_path):
    "The text's own cost and what a layer's removal adds, against plain forward passes"
    import math
    import jsonschema
    from peer_nb.analysis.impact import ABLATE_SCHEMA
    checkpoint, _ = sure
    text = "10:7 12:9 14:3 99:1 "
    (tmp_path/"t.txt").write_text(text)
    assert main(["ablate", str(checkpoint), str(tmp_path/"t.txt"), "--what", "keys", "layers", "--window", "10", "--output", str(tmp_path/"out")]) == 0
    result = json.loads((tmp_path/"out"/"ablate.json").read_text())
    jsonschema.validate(result, ABLATE_SCHEMA)
    model = PeerMLAForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()
    ids = torch.tensor(load_tokenizer(DatasetConfig(tokenizer_name="bytes"))(text, add_special_tokens=False)["input_ids"]).view(2, 10)
    @torch.no_grad()
    def bits(): return -model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item() / math.log(2) / 18
    before = bits()
    assert result["bits_per_byte"] == pytest.approx(before, abs=1e-9)
    model.model.layers[1].memory.values.weight.data.zero_()
    whole, = (p for p in result["parts"] if (p["layer"], p["key"]) == (1, "whole"))
    assert whole["more_bits_per_byte"] == pytest.approx(bits() - before, abs=1e-9)


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_ablation_costs_nothing(sure, tmp_path):
    "The process is killed once some examples are on the disk; the same command goes on and ends where an undisturbed one does"
    import os
    import signal
    import subprocess
    import sys
    import time
    checkpoint, data = sure
    words = ["ablate", str(checkpoint), str(data), "--layers", "2", "--limit", "10", "--batch-tokens", "5", "--output"]
    script = "import sys; from peer_nb.analysis.command import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", script, *words, str(tmp_path/"killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    examples = tmp_path/"killed"/"examples.jsonl"
    while process.poll() is None and not (examples.exists() and examples.read_bytes().count(b"\n") >= 2): time.sleep(.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    done = [json.loads(line)["id"] for line in examples.read_bytes().splitlines() if line.endswith(b"}")]
    assert 2 <= len(done) < 10
    assert main([*words, str(tmp_path/"killed")]) == 0 and main([*words, str(tmp_path/"whole")]) == 0
    def lines(folder, name): return [json.loads(line) for line in (tmp_path/folder/name).read_text().splitlines()]
    assert [e["id"] for e in lines("killed", "examples.jsonl")][:len(done)] == done
    for name, key in (("examples.jsonl", lambda r: r["id"]), ("effects.jsonl", lambda r: (r["id"], r["layer"], r["key"]))):
        killed, whole = ({key(r): r for r in lines(folder, name)} for folder in ("killed", "whole"))
        assert killed.keys() == whole.keys() and len(lines("killed", name)) == len(whole)
        for one in whole: # what is left is batched anew, which may change a last bit
            for field, value in whole[one].items(): assert killed[one][field] == (pytest.approx(value, abs=1e-9) if isinstance(value, float) else value)
