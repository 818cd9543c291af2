"What the interventions claim, against weights that are edited, scores of all rows, and one whole evaluation per key."
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from peer_nb.analysis.ablation import heads_of_data, ngram_effects, part_records
from peer_nb.analysis.command import main
from peer_nb.analysis.interventions import MODES, answers_of, clean_pass, effects_of, random_keys, setting_of
from peer_nb.analysis.swaps import swap_matrix, swap_rows
from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.recall import Question, encode_questions
from peer_nb.files import UserError
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.models.product_keys import SCORES

torch.set_num_threads(1)
TEXTS = [("7:", "31"), ("12:", "4"), ("905:", "77"), ("3:", "9"), ("44:", "123"), ("8:", "8")]


def small(**options) -> PeerMLAForCausalLM:
    "Memories in layers 1 and 2 of three, so that one is resumed and the other is the last"
    torch.manual_seed(0)
    peer = dict(num_experts=16, product_key_dim=[4, 4], num_heads=2, num_experts_per_tok=4, query_dim=8, query_norm="batch") | options.pop("peer_config", {})
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=260, max_position_embeddings=64, peer_start_layer=1, initializer_range=.4)
    attention = dict(q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4)
    model = PeerMLAForCausalLM(PeerMLAConfig(**sizes, mla_config=attention, peer_config=peer, **options))
    for layer in model.model.layers[1:]:
        if layer.routed: torch.nn.init.normal_(layer.mlp.gate.e_score_correction_bias, std=.1)
    for layer in (layer.memory for layer in model.model.layers if hasattr(layer, "memory")):
        for name in layer.table_names: torch.nn.init.normal_(getattr(layer, name).weight)
    return model.double().eval()


@pytest.fixture(scope="module")
def encoded():
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    return encode_questions(tokenizer, [Question(f"test/{i}", "test", prompt, answer, " ") for i, (prompt, answer) in enumerate(TEXTS)])


@torch.no_grad()
def asked(model, encoded) -> list[tuple[float, bool]]:
    "Log-probability of each answer and whether it is the likeliest, by a whole forward pass"
    rows, found = [e.context + e.answer for e in encoded], []
    width = max(map(len, rows))
    logits = model(torch.tensor([row + [0]*(width - len(row)) for row in rows])).logits
    for e, row in zip(encoded, logits):
        logp, right = row[len(e.context) - 1:len(e.context) + len(e.answer) - 1].log_softmax(-1), torch.tensor(e.answer)
        found.append((logp.gather(1, right[:, None]).sum().item(), bool((logp.argmax(-1) == right).all())))
    return found


def all_scores(layer, x):
    query = layer.queries(x)
    first, second = layer.similarities(query)
    return (first[..., :, None] + second[..., None, :]).flatten(-2), query          # [tokens, heads, N]


def with_scores(layer, change):
    "The layer's router by brute force over scores that were changed"
    def route(x, mask=None):
        scores, query = all_scores(layer, x)
        best, index = change(scores, query).topk(layer.top_k, -1)
        return SCORES[layer.score](best), index
    return route


def renormed(layer, key):
    def route(x, mask=None):
        best, index = all_scores(layer, x)[0].topk(layer.top_k, -1)
        weights = SCORES[layer.score](best)
        left = weights * (index != key)
        return left * (weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True).clamp_min(1e-300)), index
    return route


def put(scores, key, value):
    scores = scores.clone()
    scores[..., key] = value
    return scores


def mean_read(layer, key, mean):
    def read(x, weights, index):
        kept = torch.where(index == key, 0, weights)
        return type(layer).read(layer, x, kept, index) + (weights - kept).sum(1, keepdim=True) * mean
    return read


@torch.no_grad()
def naive(model, encoded, number, mode, key, setting) -> list[tuple[float, bool]]:
    "One whole evaluation of a model in which one key is ablated"
    layer = model.model.layers[number].memory
    tables = [getattr(layer, name).weight for name in layer.table_names]
    before = [t.clone() for t in tables]
    if mode == "drop": tables[-1][key] = 0
    elif mode == "sub-key":
        first, second = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        tables[-1][(first.flatten() == key) | (second.flatten() == key - 4)] = 0
    elif mode == "resample":
        for t in tables: t[key] = t[setting.stand_ins(number)[key]]
    elif mode == "mean": layer.read = mean_read(layer, key, setting.mean[number])
    elif mode == "renorm": layer.route = renormed(layer, key)
    elif mode == "refill": layer.route = with_scores(layer, lambda s, q: put(s, key, -torch.inf))
    elif mode == "zero-key": layer.route = with_scores(layer, lambda s, q: put(s, key, 0))
    elif mode == "random-key":
        vector = random_keys(layer, number, torch.tensor([key]), setting.seed)[0]                  # [heads, query_dim]
        layer.route = with_scores(layer, lambda s, q: put(s, key, torch.einsum('thc,hc->th', q, vector)))
    try: return asked(model, encoded)
    finally:
        for t, was in zip(tables, before): t.copy_(was)
        for name in ("route", "read"): vars(layer).pop(name, None)


def fast(model, encoded, number, mode, setting, room=40):
    "Log-probability and exactness of each example and key, [E, keys]; which pairs were computed"
    units, found = 8 if mode == "sub-key" else 16, clean_pass(model, answers_of(encoded))
    after, exact = found.logprob.sum(-1)[:, None].repeat(1, units), found.right.all(-1)[:, None].repeat(1, units)
    computed = torch.zeros_like(exact)
    for part in effects_of(model, found, [number], *(("sub-keys", "drop") if mode == "sub-key" else ("keys", mode)), setting, room):
        after[part.example, part.unit], exact[part.example, part.unit] = part.logprob, part.exact
        assert not computed[part.example, part.unit].any()
        computed[part.example, part.unit] = True
    return after, exact, computed


def compare(model, encoded, modes, numbers=(1, 2), without=naive) -> int: # pairs that needed no computation
    setting = setting_of(model, [answers_of(encoded)], seed=3)
    missed = 0
    for number in numbers:
        for mode in modes:
            after, exact, computed = fast(model, encoded, number, mode, setting)
            for key in range(after.shape[1]):
                truth = without(model, encoded, number, mode, key, setting)
                worst = max(abs(a - t) for a, (t, _) in zip(after[:, key].tolist(), truth))
                assert worst <= 1e-9, f"layer {number}, {mode}, key {key}: {worst}"
                assert exact[:, key].tolist() == [e for _, e in truth]
            missed += int((~computed).sum())
    return missed


@pytest.mark.parametrize("kind", ["peer", "pkm", "memory_plus"])
def test_every_key_layer_and_mode_equals_one_evaluation_per_key(kind, encoded):
    "The naive loop edits tables, or routes by the scores of all rows; nothing of it is shared with the code it judges"
    assert compare(small(memory_kind=kind), encoded, [*MODES, "sub-key"]) > 0


def test_a_memory_beside_a_feed_forward(encoded):
    "What changes values or weights alone is exact; the next best row of a bilinear score is not known, and refused"
    model = small(memory_kind="ultramem")
    compare(model, encoded, ["drop", "mean", "resample"])
    setting = setting_of(model, [answers_of(encoded)])
    with pytest.raises(UserError, match="no sum over its sub-keys"): fast(model, encoded, 1, "refill", setting)


EXPERTS = dict(n_routed_experts=16, num_experts_per_tok=3, moe_intermediate_size=6, n_group=4, topk_group=2, routed_scaling_factor=1.5)


@torch.no_grad()
def without_expert(model, encoded, number, mode, key, setting) -> list[tuple[float, bool]]:
    "One whole evaluation of a model in which an expert's matrix is zero, another's, or its weight goes to the others or to a mean"
    layer = model.model.layers[number].mlp
    tables, gate = list(layer.experts.parameters()), layer.gate.forward
    before = [t.clone() for t in tables]
    def renormed(x):
        weights, index, *others = gate(x)
        left = weights * (index != key)
        return left * weights.sum(-1, keepdim=True) / left.sum(-1, keepdim=True), index, *others
    def by_mean(layer, x, weights, index):
        gone = (weights * (index == key)).sum(-1, keepdim=True)
        return layer.experts(x, weights * (index != key), index) + gone * setting.mean[number]
    if mode == "drop": tables[1][key] = 0
    elif mode == "resample":
        for t in tables: t[key] = t[setting.stand_ins(number)[key]]
    elif mode == "renorm": layer.gate.forward = renormed
    else: layer.reader = by_mean
    try: return asked(model, encoded)
    finally:
        for t, was in zip(tables, before): t.copy_(was)
        vars(layer.gate).pop("forward", None)
        layer.reader = None


@pytest.mark.parametrize("shared", [0, 1])
def test_an_expert_left_out_is_a_model_without_it(shared, encoded):
    model = small(memory_kind="moe", moe_config=EXPERTS | dict(n_shared_experts=shared))
    missed = compare(model, encoded, ["drop", "renorm", "mean", "resample"] if shared else ["drop", "renorm"], without=without_expert)
    assert missed > 0                                                                 # experts that no token of an example chose
    for what, mode in (("keys", "refill"), ("keys", "random-key"), ("sub-keys", "drop")):
        with pytest.raises(UserError, match="no sum over its sub-keys" if what == "keys" else "has no sub-keys"): list(effects_of(model, clean_pass(model, answers_of(encoded)), [1], what, mode))


def test_parts_of_a_mixture_are_left_out(encoded):
    "All routed experts, their matrices exchanged, a router of random directions; heads: one, which is the whole"
    model = small(memory_kind="moe", moe_config=EXPERTS)
    clean, names = clean_pass(model, answers_of(encoded)), [e.question.id for e in encoded]
    found = {(r["layer"], r["key"], r["id"]): r["delta_logprob"] for r in part_records(model, clean, names, [1, 2], "layers", 0)}
    before = [t.clone() for t in model.model.layers[1].mlp.experts.parameters()]
    torch.nn.init.zeros_(model.model.layers[1].mlp.experts.down_proj)
    whole = [a - b for (a, _), b in zip(asked(model, encoded), clean.logprob.sum(-1).tolist())]
    with torch.no_grad():
        for t, was in zip(model.model.layers[1].mlp.experts.parameters(), before): t.copy_(was)
    assert max(abs(found[1, "whole", name] - want) for name, want in zip(names, whole)) < 1e-9
    head, = effects_of(model, clean, [1], "heads")
    assert max(abs(float(l) - b - found[1, "whole", names[e]]) for e, l, b in zip(head.example.tolist(), head.logprob, clean.logprob.sum(-1).tolist())) < 1e-9
    assert all(found[1, part, name] != 0 for part in ("values", "keys") for name in names)


@pytest.mark.parametrize("score", ["sigmoid", "relu"])
def test_other_scores(score, encoded):
    model = small(memory_kind="memory_plus", peer_config=dict(score=score, expert_hidden_size=2, shared_keys=True, query_norm="layer"))
    compare(model, encoded, ["drop", "renorm", "refill", "zero-key", "random-key"])


def test_a_table_that_is_read_whole_has_nothing_to_fill_in(encoded):
    "k rows of k: the next best row does not exist"
    model = small(memory_kind="pkm", peer_config=dict(num_experts=4, product_key_dim=[2, 2]))
    setting = setting_of(model, [answers_of(encoded)])
    for mode in MODES:
        found = clean_pass(model, answers_of(encoded))
        truth = [naive(model, encoded, 1, mode, key, setting) for key in range(4)]
        for part in effects_of(model, found, [1], "keys", mode, setting):
            for example, key, logprob in zip(part.example.tolist(), part.unit.tolist(), part.logprob.tolist()):
                assert logprob == pytest.approx(truth[key][example][0], abs=1e-9)


def test_rows_that_come_in_would_be_missed_by_looking_at_retrieved_ones_only(encoded):
    "An edit of a key changes examples that did not retrieve it, and the certificate names every one of them"
    model = small(memory_kind="pkm")
    setting = setting_of(model, [answers_of(encoded)], seed=3)
    retrieved = clean_pass(model, answers_of(encoded))
    for mode in ("zero-key", "random-key"):
        after, _, computed = fast(model, encoded, 1, mode, setting)
        changed = (after - retrieved.logprob.sum(-1)[:, None]).abs() > 1e-12
        had = torch.zeros_like(computed)
        for part in effects_of(model, retrieved, [1], "keys", "drop"): had[part.example, part.unit] = True
        assert (changed & ~had).any() and not (changed & ~computed).any()


@pytest.mark.parametrize("kind", ["peer", "memory_plus"])
def test_a_shared_row_is_left_out_wherever_it_is_read(kind, encoded):
    model = small(memory_kind=kind, share_memory=True)
    table = getattr(model.model.layers[1].memory, model.model.layers[1].memory.table_names[-1]).weight
    found, seen = clean_pass(model, answers_of(encoded)), set()
    clean = found.logprob.sum(-1).tolist()
    after = [clean.copy() for _ in range(16)]
    for part in effects_of(model, found, [1, 2]):
        for example, key, logprob in zip(part.example.tolist(), part.unit.tolist(), part.logprob.tolist()):
            assert (example, key) not in seen
            seen.add((example, key))
            after[key][example] = logprob
    for key in range(16):
        with torch.no_grad():
            was, table[key] = table[key].clone(), 0
            assert [p for p, _ in asked(model, encoded)] == pytest.approx(after[key], abs=1e-9)
            table[key] = was


@pytest.mark.parametrize("what", ["heads", "positions", "layer"])
def test_heads_positions_and_layers_against_a_layer_that_is_written_out(what, encoded):
    model = small(memory_kind="pkm")
    for number in (1, 2):
        layer = model.model.layers[number].memory
        found, truth = clean_pass(model, answers_of(encoded)), {}
        for part in effects_of(model, found, [number], what):
            for example, unit, logprob in zip(part.example.tolist(), part.unit.tolist(), part.logprob.tolist()):
                def forward(x, mask=None):
                    weights, index = layer.route(x.flatten(0, 1))
                    weights = weights.unflatten(0, x.shape[:2]).clone()
                    if what == "heads": weights[:, :, unit] = 0
                    elif what == "positions": weights[:, unit] = 0
                    else: weights[:] = 0
                    return torch.einsum("btp,btpd->btd", weights.flatten(2), layer.values.weight[index.view(*x.shape[:2], -1)])
                if unit not in truth:
                    layer.forward = forward
                    truth[unit] = asked(model, encoded)
                    del layer.forward
                assert truth[unit][example][0] == pytest.approx(logprob, abs=1e-9)


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_a_head_of_attention_left_out_is_a_model_whose_output_projection_lacks_it(mode, encoded):
    "Nothing or a mean in a head's place is the projection without the head's columns, with a bias; another question's output is put in position by position"
    model, names = small(), [e.question.id for e in encoded]
    answers, heads = answers_of(encoded), heads_of_data(model, encoded, mode, batch_tokens=40, seed=0)
    clean = clean_pass(model, answers)
    found = {(r["layer"], r["key"], r["id"]): r for r in part_records(model, clean, names, [1, 2], "heads", 0, heads)}
    assert len(found) == 3*2*len(names) and any(abs(r["delta_logprob"]) > .1 for r in found.values())
    before, written = asked(model, encoded), {}
    for e in encoded:                                                            # each question by itself: [T, heads, width]
        hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x, e=e, n=n: written.update({(e.question.id, n): x[0][0].unflatten(-1, (2, 8))})) for n, layer in enumerate(model.model.layers)]
        model(torch.tensor([e.context + e.answer[:-1]]))
        for hook in hooks: hook.remove()
    for n, layer in enumerate(model.model.layers):
        own, mean = layer.self_attn.o_proj, torch.cat([written[name, n] for name in names]).mean(0)
        for head in range(2):
            columns = slice(8*head, 8*head + 8)
            layer.self_attn.o_proj = other = torch.nn.Linear(16, 16, bias=mode == "mean", dtype=torch.float64)
            with torch.no_grad():
                other.weight.copy_(own.weight)[:, columns] = 0
                if mode == "mean": other.bias.copy_(own.weight[:, columns] @ mean[head])
            for e, (first, _) in zip(encoded, before):
                with torch.no_grad():
                    if mode == "resample":
                        candidates = [d for d in names if d != e.question.id]
                        after = [given_another(model, e, own.weight[:, columns], other, written[d, n][:, head]) for d in candidates]
                    else: after = [asked(model, [e])[0][0]]
                got = found[n, f"attention {head}", e.question.id]["delta_logprob"]
                assert min(abs(first + got - a) for a in after) < 1e-9
            layer.self_attn.o_proj = own


def given_another(model, e, columns, projection, output) -> float:
    "An answer's log-probability when a head writes what it wrote for another question"
    length = len(e.context) + len(e.answer)
    there = output[torch.arange(length).clamp_max(len(output) - 1)]                # [T, width]
    hook = projection.register_forward_hook(lambda _, given, out: out + there[:out.shape[1]] @ columns.T)
    try: return asked(model, [e])[0][0]
    finally: hook.remove()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    "A checkpoint and a data set of a few facts, hardly learned"
    from peer_nb.analysis.worked_example import learn_facts
    return learn_facts(facts=6, enough=1.5).save(tmp_path_factory.mktemp("facts"))


def lines(file) -> list[dict]: return [json.loads(line) for line in file.read_text().splitlines()]


def keyed(file) -> dict:
    found = {(r["id"], r["what"], r["layer"], r["key"]): r for r in lines(file)}
    assert len(found) == len(lines(file)), "a pair stands twice"
    return found


def test_a_command_killed_anywhere_goes_on_and_repeats_nothing(learned, tmp_path, capsys):
    "Files cut as a kill cuts them, between batches and within a line"
    checkpoint, data = learned
    words = ["ablate", str(checkpoint), str(data), "--all", "--batch-tokens", "30", "--output"]
    assert main([*words, str(tmp_path/"whole")]) == 0
    whole, result = keyed(tmp_path/"whole"/"effects.jsonl"), json.loads((tmp_path/"whole"/"ablate.json").read_text())
    assert {w for _, w, _, _ in whole} == {"keys", "layers", "heads", "positions"} and result["examples"] == 7
    assert "<h1>What each memory does</h1>" in (tmp_path/"whole"/"index.html").read_text()
    for done, share in ((0, .1), (4, .6)):
        cut = tmp_path/f"cut{done}"
        shutil.copytree(tmp_path/"whole", cut)
        examples, effects = (cut/"examples.jsonl").read_bytes().splitlines(True), (cut/"effects.jsonl").read_bytes()
        names = {json.loads(line)["id"] for line in examples[:done]}
        last = max((i for i, line in enumerate(effects.splitlines(True)) if json.loads(line)["id"] in names), default=-1)
        least = len(b"".join(effects.splitlines(True)[:last + 1]))
        (cut/"examples.jsonl").write_bytes(b"".join(examples[:done]) + b'{"id": "torn')
        (cut/"effects.jsonl").write_bytes(effects[:max(least, int(share * len(effects)))])
        assert main([*words, str(cut)]) == 0
        again = keyed(cut/"effects.jsonl")
        assert set(again) == set(whole)
        for pair, record in again.items():
            assert record["delta_logprob"] == pytest.approx(whole[pair]["delta_logprob"], abs=1e-9) and record["exact_after"] == whole[pair]["exact_after"]
        now = json.loads((cut/"ablate.json").read_text())
        assert [k["key"] for k in now["keys"]] == [k["key"] for k in result["keys"]]
    assert main([*words[:-1], "--seed", "5", "--output", str(tmp_path/"whole")]) == 2 and "seed" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--layers", "0"], "layer 0 is none of the memory layers: 1"), (["--mode", "refill", "--what", "sub-keys"], "is for keys"),
    (["--what", "rows"], "rows"), (["--limit", "0"], "too small")])
def test_mistakes_end_in_one_line_and_nothing_is_written(learned, tmp_path, capsys, words, said):
    checkpoint, data = learned
    assert main(["ablate", str(checkpoint), str(data), "--output", str(tmp_path/"none"), *words]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and not (tmp_path/"none").exists()


def test_questions_of_a_file_and_a_text(learned, tmp_path, capsys):
    checkpoint, _ = learned
    (tmp_path/"q.jsonl").write_text('{"prompt": "123456:", "answer": "654321"}\n{"prompt": "1:", "answer": "2"}\n')
    (tmp_path/"t.txt").write_text("0123456789" * 3)
    (tmp_path/"none.jsonl").write_text("")
    for name, examples in (("q.jsonl", 2), ("t.txt", 3)):
        assert main(["ablate", str(checkpoint), str(tmp_path/name), "--window", "12", "--output", str(tmp_path/name[0])]) == 0
        assert json.loads((tmp_path/name[0]/"ablate.json").read_text())["examples"] == examples
    assert main(["ablate", str(checkpoint), str(tmp_path/"none.jsonl"), "--output", str(tmp_path/"no")]) == 2
    assert "holds nothing to ask" in capsys.readouterr().err
    assert main(["retrievals", str(checkpoint), str(tmp_path/"q.jsonl"), "--output", str(tmp_path)]) == 2 and "holds no retrievals" in capsys.readouterr().err
    def drawn(folder): return re.sub(r"[0-9a-f-]{36}", "", (folder/"index.html").read_text())   # plotly names figures anew
    first = drawn(tmp_path/"q")
    assert main(["page", str(tmp_path/"q"/"ablate.json"), "--output", str(tmp_path/"again")]) == 0
    assert drawn(tmp_path/"again") == first
    (tmp_path/"q"/"effects.jsonl").unlink()
    assert main(["page", str(tmp_path/"q"/"ablate.json")]) == 2 and drawn(tmp_path/"q") == first


@pytest.mark.parametrize("kind", ["peer", "memory_plus"])
def test_a_swap_matrix_is_that_of_models_whose_tables_were_changed(kind, encoded):
    "Each cell against a model whose rows were exchanged, and transformers' own greedy generation"
    model = small(memory_kind=kind)
    alike = [e for e in encoded if len(e.context) == 3]
    said = [model.generate(torch.tensor([e.context]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist() for e in alike]
    known = [replace(e, answer=answer) for e, answer in zip(alike, said)]
    found, memory = swap_matrix(model, known, layer=1, facts=3), model.model.layers[1].memory
    assert len(found["facts"]) >= 2 and found["efficacy"]["n"] == len(found["cells"])
    places = {e.question.id: e for e in known}
    for cell in found["cells"]:
        a, b = (found["facts"][cell[name]] for name in ("asked", "partner"))
        swap_rows(memory, a["row"], b["row"])
        now = model.generate(torch.tensor([places[a["id"]].context]), attention_mask=torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 3:].tolist()
        swap_rows(memory, a["row"], b["row"])
        assert cell["own_places"] == [s == t for s, t in zip(now, places[a["id"]].answer)] and cell["partner_places"] == [s == t for s, t in zip(now, places[b["id"]].answer)]


NGRAMS = dict(layers=[0, 2], num_heads=2, table_size=7, embed_dim=8)


def with_ngrams(tokenizer, **options):
    model = small(engram_config=NGRAMS, **options)
    model.get_decoder().take_tokens(tokenizer)
    for n in (0, 2):
        torch.nn.init.normal_(model.model.layers[n].engram.conv)
        torch.nn.init.normal_(model.model.layers[n].engram.table.weight)
    return model


@torch.no_grad()
def test_a_row_of_ngrams_left_out_is_a_table_without_it(encoded):
    model = with_ngrams(load_tokenizer(DatasetConfig(tokenizer_name="bytes")), use_peer=False)
    clean = clean_pass(model, answers_of(encoded), [])
    for number in (0, 2):
        table = model.model.layers[number].engram.table.weight
        before, after = table.clone(), clean.logprob.sum(-1)[:, None].repeat(1, len(table))
        for part in ngram_effects(model, clean, number, room=50):
            after[part.example, part.unit] = part.logprob
            assert (part.weight >= 1).all() and (part.position < clean.answers.ids.shape[1]).all()
        for row in range(len(table)):
            table[row] = 0
            assert max(abs(a - t) for a, (t, _) in zip(after[:, row].tolist(), asked(model, encoded))) <= 1e-9, (number, row)
            table.copy_(before)
    silent = part_records(model, clean, [e.question.id for e in encoded], [], "layers", 0)
    model.model.layers[0].engram.forward = lambda h, *others: torch.zeros_like(h)
    assert [r["delta_logprob"] for r in silent if r["layer"] == 0] == pytest.approx([a - b for (a, _), b in zip(asked(model, encoded), clean.logprob.sum(-1).tolist())], abs=1e-9)


def saved(model, folder):
    model.float().save_pretrained(folder)
    load_tokenizer(DatasetConfig(tokenizer_name="bytes")).save_pretrained(folder)
    return folder


def test_commands_about_experts_and_ngrams(tmp_path, monkeypatch, capsys):
    "What works, works; what has no meaning is said in a line, before anything is written"
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("asked.jsonl").write_text("".join(json.dumps(dict(prompt=prompt, answer=answer)) + "\n" for prompt, answer in TEXTS[:2]))
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    saved(small(memory_kind="moe", moe_config=EXPERTS), tmp_path/"moe")
    saved(with_ngrams(tokenizer, use_peer=False), tmp_path/"ngrams")
    saved(with_ngrams(tokenizer), tmp_path/"both")
    saved(small(memory_kind="ultramem"), tmp_path/"ultramem")
    for words, said in [("ablate moe asked.jsonl --what keys layers positions --output a", "layer 1: "), ("ablate moe asked.jsonl --mode renorm --output b", "layer 2: "),
                        ("ablate ngrams asked.jsonl --what n-grams layers --output c", "layer 0 n-grams: "), ("retrievals moe asked.jsonl", " retrievals: "),
                        ("ablate both asked.jsonl --layers 2 --output d", "layer 2: "), ("ablate ultramem asked.jsonl --mode mean --output e", "layer 1: ")]:
        assert main(words.split()) == 0 and said in capsys.readouterr().out, words
    there = {p.name for p in tmp_path.iterdir()}
    for words, said in [("ablate moe asked.jsonl --what sub-keys", "has no sub-keys"), ("ablate moe asked.jsonl --mode refill", "drop, renorm, mean, resample"), ("ablate ultramem asked.jsonl --mode zero-key", "drop, renorm, mean, resample"),
                        ("swap moe asked.jsonl", "whose rows are experts: peer-analyze usage, ablate"), ("intervene moe asked.jsonl --drop 1", "whose rows are experts"), ("ablate ngrams asked.jsonl", "ablate --what n-grams"),
                        ("ablate moe asked.jsonl --what n-grams", "looks no n-grams up"), ("ablate ngrams asked.jsonl --what n-grams --layers 1", "before layers 0, 2 only"), ("swap ngrams asked.jsonl", "but n-grams"),
                        ("ablate ngrams asked.jsonl --what n-grams --mode renorm", "no weights to share"), ("ablate both asked.jsonl", "--what layers runs the whole model")]:
        assert main(words.split()) == 2, words
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error, error
    assert {p.name for p in tmp_path.iterdir()} == there
