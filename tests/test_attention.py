"Heads made by hand are found, weights are those of the model, and a long text is read in blocks."
import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Mamba2Config, Mamba2ForCausalLM

from peer_nb.analysis import attention as heads
from peer_nb.analysis.attention import PATTERNS, ReadText, each_block, head_names, in_blocks, pattern_rows, score_text
from peer_nb.analysis.command import main
from peer_nb.analysis.worked_example import facts_config
from peer_nb.config import DatasetConfig
from peer_nb.data.corpora import load_tokenizer
from peer_nb.files import UserError
from peer_nb.models.causal_lm import PeerMLAForCausalLM


def hand_made(vocabulary: int, length: int, sharp: float = 40.) -> GPT2LMHeadModel:
    "The residual stream holds token, position and the token before; layer 0 head 0 reads t-1, layer 1 head 0 what came after the same token"
    d = 2*vocabulary + length
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=length, n_embd=d, n_head=2, n_layer=2)).eval()
    token, place, before = slice(0, vocabulary), slice(vocabulary, vocabulary + length), slice(vocabulary + length, d)
    with torch.no_grad():
        for weight in model.parameters(): weight.zero_()
        for block in model.transformer.h: block.ln_1.weight.fill_(1)
        model.transformer.wte.weight[:, token], model.transformer.wpe.weight[:, place] = torch.eye(vocabulary), torch.eye(length)
        one, two = (block.attn.c_attn.weight for block in model.transformer.h)
        one[place, :length], one[place, d:d + length] = sharp*torch.eye(length).roll(-1, 1), torch.eye(length)
        one[token, 2*d:2*d + vocabulary] = torch.eye(vocabulary)
        model.transformer.h[0].attn.c_proj.weight[:vocabulary, before] = torch.eye(vocabulary)
        two[token, :vocabulary], two[before, d:d + vocabulary] = sharp*torch.eye(vocabulary), torch.eye(vocabulary)
    return model


def repeated(seed: int, half: int) -> ReadText:
    ids = torch.randperm(half, generator=torch.Generator().manual_seed(seed)).repeat(2)
    none = torch.zeros(len(ids), dtype=torch.bool)
    return ReadText(f"text {seed}", ids, none, none, none)


@pytest.mark.parametrize("queries", [1, 7, 1000])
def test_heads_made_by_hand_are_found(monkeypatch, queries):
    monkeypatch.setattr(heads, "block_rows", lambda heads, length: queries)
    model, texts = hand_made(16, 32), [repeated(seed, 16) for seed in range(3)]
    assert in_blocks(model, texts[0].ids[None])
    rows = pattern_rows([score_text(model, text, n) for n, text in enumerate(texts)])
    assert head_names(rows) == {(0, 0): "previous", (1, 0): "induction"}
    by = {(r["layer"], r["head"], r["pattern"]): r for r in rows}
    assert by[0, 0, "previous"]["score"] > .95 and by[0, 0, "previous"]["shuffled"] > .95     # it goes by positions
    assert by[1, 0, "induction"]["score"] > .95 > .2 > by[1, 0, "induction"]["chance"]
    equal = sum(1/(t + 1) for t in range(1, 32)) / 31                                          # a head of zeros looks everywhere alike
    for pattern in ("previous", "first"): assert by[1, 1, pattern]["score"] == pytest.approx(equal, abs=1e-5) == by[1, 1, pattern]["chance"]


def test_scores_equal_sums_over_the_models_own_weights():
    "Latent attention, by the formulas of the page written out in loops over the weights that the model returns"
    torch.manual_seed(0)
    model, n = PeerMLAForCausalLM(facts_config(12, 40)).eval(), 30
    ids, marks = torch.randint(0, 12, (n,)), torch.rand(4, n) < .3
    text = ReadText("t", ids, marks[0], marks[1] & (torch.arange(n) < 12), marks[2] & (torch.arange(n) >= 15))
    found = score_text(model, text)["score"]
    with torch.no_grad(): weights = torch.stack(model(ids[None], output_attentions=True).attentions)[:, 0]       # [L, H, T, T]
    x, keys = ids.tolist(), text.keys
    sets = dict(
        previous={t: [t - 1] for t in range(1, n)}, local={t: range(t - 7, t + 1) for t in range(8, n)}, first={t: [0] for t in range(1, n)},
        induction={t: [s for s in range(1, t) if x[s - 1] == x[t]] for t in range(n)}, duplicate={t: [s for s in range(t) if x[s] == x[t]] for t in range(n)},
        delimiter={t: [s for s in range(t + 1) if text.delimiters[s]] for t in range(n)}, key={t: [s for s in range(t + 1) if keys[s]] for t in range(n) if text.predicting[t]})
    for p, name in enumerate(PATTERNS):
        asked = {t: list(s) for t, s in sets[name].items() if list(s)}
        means = torch.stack([weights[:, :, t, s].sum(-1) for t, s in asked.items()]).mean(0)
        assert torch.allclose(found[:, :, p], means, atol=1e-5), name


def test_no_matrix_of_all_heads_at_once(monkeypatch):
    monkeypatch.setattr(heads, "BLOCK_NUMBERS", 4*40*5)
    model, largest = PeerMLAForCausalLM(facts_config(12, 40)).eval(), []
    each_block(model, torch.randint(0, 12, (1, 40)), lambda layer, start, weights: largest.append(weights.numel()))
    assert max(largest) <= 4*40*5 and len(largest) == 2*8


def test_a_hash_is_found_wherever_it_stands_in_a_prompt():
    assert heads.key_spans("ab = cd\ncd = 'ef'\nab = '") == [(0, 2), (18, 20)]


def test_mistakes_are_one_line(tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer, mamba = load_tokenizer(DatasetConfig(tokenizer_name="bytes")), Mamba2ForCausalLM(Mamba2Config(vocab_size=300, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1))
    for name, model in (("mamba", mamba), ("ours", PeerMLAForCausalLM(facts_config(len(tokenizer), 64, num_attention_heads=2)))):
        model.save_pretrained(tmp_path/name)
        tokenizer.save_pretrained(tmp_path/name)
    with pytest.raises(UserError, match="a Mamba2ForCausalLM returns no attention weights"): in_blocks(mamba.eval(), torch.ones(1, 4, dtype=torch.long))
    (tmp_path/"text.txt").write_text("a, b; " * 20)
    out = tmp_path/"out"
    for words, said in ((["mamba", "--window", "32"], "returns no attention weights"), (["ours", "--window", "65"], "give --window 64 or less"), (["ours", "--limit", "0"], "must be at least 1"), (["none"], "no such folder")):
        assert main(["attention", str(tmp_path/words[0]), str(tmp_path/"text.txt"), "--output", str(out), *words[1:]]) == 2
        complaint = capsys.readouterr().err
        assert said in complaint and "Traceback" not in complaint and not out.exists()
    command = ["attention", str(tmp_path/"ours"), str(tmp_path/"text.txt"), "--window", "32", "--output", str(out)]
    assert main(command) == 0
    scores, log = (out/"attention_scores.json").read_bytes(), (out/"attention_texts.jsonl").read_bytes()
    lines = log.splitlines(keepends=True)
    (out/"attention_texts.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:50])          # killed in the third text
    assert main(command) == 0
    assert (out/"attention_scores.json").read_bytes() == scores and (out/"attention_texts.jsonl").read_bytes() == log
    assert len(json.loads(scores)["named"]) <= 4 and {p.name for p in out.glob("*.png")} >= {"attention_grid_visualization.png", "attention_head_1_1.png"}
