"Masks and collators: the same labels in every shape of a batch, with every tokenizer, and the mistakes that such masks are known for."
import json
from dataclasses import fields
from functools import cache
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast

from peer_nb.config import DatasetConfig, DatasetEntry
from peer_nb.files import UserError
from peer_nb.data.collate import DataCollatorForLanguageModelingVarLen, build_dataloader, count_targets
from peer_nb.data.corpora import load_tokenizer
from peer_nb.data.masking import (MaskStatistics, Surfaces, apply_digit_lookup_mask, apply_hashhop_mask, apply_synthetic_qa_mask, surfaces_of,
                                  trained_by_offsets)
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.tasks.answers import hashhop_spans
from peer_nb.tasks.registry import MASKS

APPLY = {"qa": apply_synthetic_qa_mask, "hashhop": apply_hashhop_mask, "digit_lookup": apply_digit_lookup_mask}
PAIRS = ["".join(f"{i*7919 % 10**6:06d}:{i*104729 % 10**6:06d} " for i in range(j, j + 4)) for j in range(60)]
HOPS = [f"{a}{b}Kq = {b}{a}Zw\n{b}{a}Zw = 'x{a}{a}y'\nCOMPLETION:\nHops=2\n\nCoT=True\n\n{a}{b}Kq = '{b}{a}Zw = x{a}{a}y'\n" for a in "abcdef" for b in "ghij"]
QUESTIONS = [f"Where does number {i} live? In house {i*i} of Zürich. " for i in range(30)]


def byte_level(texts, size, pad="<eos>", **how):
    "A BPE trained on texts, with the trimmed offsets of GPT-2's."
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, **how), decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=list(dict.fromkeys(["<eos>", pad])), show_progress=False,
                                                        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token=pad)


def sentencepiece(texts, size):
    "A BPE in the manner of Llama 2: a space put in front, `▁` for spaces, bytes for what is unknown."
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "</s>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special + [f"<0x{b:02X}>" for b in range(256)], show_progress=False))
    made = Tokenizer.from_str(made.to_str().replace('"byte_fallback":false', '"byte_fallback":true'))
    made = without_special_bytes(made)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<unk>")


def without_special_bytes(made):
    "The byte tokens are ordinary entries of the vocabulary."
    rules = json.loads(made.to_str())
    rules["added_tokens"] = [t for t in rules["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(rules))


@cache
def tokenizer(name):
    texts = PAIRS + HOPS + QUESTIONS
    return {"bytes": lambda: load_tokenizer(DatasetConfig(tokenizer_name="bytes")),
            "bpe": lambda: byte_level(texts, 420),
            "own pad": lambda: byte_level(texts, 400, pad="<pad>"),
            "merges over spaces and colons": lambda: byte_level(["1:12 :13 = 'ab = 'cd? Pa? In"]*9 + texts, 330, use_regex=False),
            "sentencepiece": lambda: sentencepiece(texts, 420)}[name]()


NAMES = ["bytes", "bpe", "own pad", "merges over spaces and colons", "sentencepiece"]
PIECE = st.one_of(st.text(st.sampled_from(list("??::  ='\\\nab12é\u2003\x85\U0001F600")), max_size=10),
                  st.sampled_from(["COMPLETION:", " = 'xY'", "152435:145344 ", "? Paris ", "= 'a\\'b", "\u00a0"]))
DOCUMENT = st.lists(PIECE, max_size=5).map("".join)


def encoded(tok, text): return tok(text, add_special_tokens=False, split_special_tokens=True).input_ids + [tok.eos_token_id]


def expected(tok, text, task, straddle="include"):
    "Labels of one document with its end of text, by the text's characters and the tokenizer's offsets."
    ids, trained = trained_by_offsets(text, tok, task, straddle)
    assert ids == encoded(tok, text)[:-1]
    return [i if t else -100 for i, t in zip(ids, trained)] + [-100]


# ---- the rules ----

def scanned(text, scope):
    "HashHop values by a scanner instead of an expression."
    at, out = max(text.find("COMPLETION:"), 0) if scope == "auto" else 0, []
    while (at := text.find("= '", at)) >= 0:
        start = i = at + 3
        while i < len(text) and text[i] not in "'\n":
            escaped = text[i] == "\\" and i + 1 < len(text)
            if escaped and text[i + 1] == "\n": break
            i += 1 + escaped
        if i < len(text) and text[i] != "'": at += 1
        else:
            if i > start: out.append((start, i))
            at = i + 1
    return out


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from(list("='= '\\\na")), max_size=30).map(lambda t: t.replace("a", " = 'a")), st.sampled_from(["auto", "all"]))
def test_hashhop_values_by_a_scanner(text, scope):
    for t in (text, "x = 'y'\nCOMPLETION:" + text): assert hashhop_spans(t, scope) == scanned(t, scope)


def test_every_mask_has_a_function_and_a_flag():
    assert set(MASKS) == set(APPLY)
    assert {f"apply_{m}_mask" for m in MASKS} <= {f.name for f in fields(DataCollatorForLanguageModelingVarLen)}


# ---- every shape of a batch ----

@pytest.mark.parametrize("name", NAMES)
def test_packed_is_padded_is_one_document_at_a_time(name):
    tok = tokenizer(name)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(DOCUMENT, min_size=1, max_size=4), st.sampled_from(list(APPLY)), st.sampled_from(["include", "exclude"]))
    def check(texts, task, straddle):
        rows = [encoded(tok, t) for t in texts]
        truth, how = [expected(tok, t, task, straddle) for t in texts], dict(straddle=straddle)
        flat, stream = sum(truth, []), torch.tensor(sum(rows, []))
        borders = torch.tensor(np.cumsum([0] + [len(r) for r in rows]), dtype=torch.int32)
        assert APPLY[task](stream, tok, **how).tolist() == flat                                        # borders by the ends of text
        assert APPLY[task](stream, tok, cu_seqlens=borders, **how).tolist() == flat
        assert APPLY[task](stream[None], tok, cu_seqlens=borders[None], **how)[0].tolist() == flat
        for side in ("left", "right"):
            batch = tok.pad(dict(input_ids=rows), return_tensors="pt", padding_side=side)
            for mask in (batch.attention_mask, None):
                labels = APPLY[task](batch.input_ids, tok, attention_mask=mask, **how)
                assert labels[batch.attention_mask == 1].tolist() == flat
                assert (labels[batch.attention_mask == 0] == -100).all()                               # pads, also where pad is eos
        options = dict(straddle=straddle) | {f"apply_{task}_mask": True}
        packed = DataCollatorForLanguageModelingVarLen(tok, varlen=True, **options)(texts)
        assert packed["labels"][0].tolist() == flat and packed["cu_seqlens"].tolist() == borders.tolist()
        padded = DataCollatorForLanguageModelingVarLen(tok, **options)(rows)
        assert padded["labels"][padded["attention_mask"] == 1].tolist() == flat
    check()


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_covered(name):
    "With `include`, what is trained spells at least the answers; with `exclude`, nothing else. Only a document's first token is left out."
    tok = tokenizer(name)
    table = surfaces_of(tok)
    for task, texts in dict(qa=QUESTIONS, hashhop=HOPS, digit_lookup=PAIRS).items():
        for text in texts[:12]:
            answers = "".join(text[a:b] for a, b in MASKS[task].spans(text))
            said = {}
            for straddle in ("include", "exclude"):
                labels = np.array(expected(tok, text, task, straddle))
                said[straddle] = table.text(labels[labels >= 0])[0].tobytes().decode()
            assert len(said["exclude"]) <= len(answers) <= len(said["include"])
            if name == "bytes": assert said["include"] == said["exclude"] == answers


def test_a_merged_colon_straddles():
    tok = tokenizer("merges over spaces and colons")
    counts = MaskStatistics()
    apply_digit_lookup_mask(torch.tensor(encoded(tok, "1:12 3:13 ")), tok, statistics=counts)
    assert counts.straddle == 2
    with pytest.raises(UserError, match="straddle"): apply_digit_lookup_mask(torch.tensor(encoded(tok, "1:12 ")), tok, straddle="error")
    with pytest.raises(UserError, match="straddles"): trained_by_offsets("1:12", tok, "digit_lookup", "error")


@pytest.mark.parametrize("name", NAMES)
def test_first_token_of_a_document_is_no_target(name):
    tok, text = tokenizer(name), "no question here, all of it is text"
    labels = apply_synthetic_qa_mask(torch.tensor(encoded(tok, text)*3), tok, train_eos=True)
    ids = encoded(tok, text)
    assert labels.tolist() == ([-100] + ids[1:])*3


# ---- truncation ----

@pytest.mark.parametrize("name", NAMES)
def test_cut_anywhere(name):
    "The collator masks before it cuts; the digit rule, which looks back only, gives the same for ids that were cut before."
    tok, texts = tokenizer(name), [PAIRS[3], "é:☃☃ 12:\U0001F600\U0001F600", "Where? In Zürich"]
    for text, task in zip(texts, ["digit_lookup", "digit_lookup", "qa"]):
        ids, truth = encoded(tok, text), expected(tok, text, task)
        for n in range(1, len(ids)):
            batch = DataCollatorForLanguageModelingVarLen(tok, varlen=True, max_length=n, **{f"apply_{task}_mask": True})([text])
            assert batch["labels"][0].tolist() == truth[:n]
            if task == "digit_lookup" and name != "merges over spaces and colons": assert apply_digit_lookup_mask(torch.tensor(ids[:n]), tok).tolist() == truth[:n]


# ---- known mistakes ----

def test_packed_qa_batches_masked_every_answer_but_the_last():
    tok = tokenizer("bytes")
    texts = ["One? 1", "Two? 2", "Three? 3"]
    stream = torch.tensor(sum((encoded(tok, t) for t in texts), []))
    for ids in (stream, stream[None], torch.stack([stream, stream])):
        labels = apply_synthetic_qa_mask(ids, tok)
        for row in labels.reshape(-1, len(stream)): assert tok.decode(row[row >= 0]) == "123"


def test_the_hashhop_mask_acted_only_after_completion():
    tok = tokenizer("bytes")
    labels = apply_hashhop_mask(torch.tensor(encoded(tok, "KmNp = 'QrSt'\nAbCd = 'EfGh'")), tok)
    assert tok.decode(labels[labels >= 0]) == "QrStEfGh"


@pytest.mark.parametrize("side", ["left", "right"])
def test_values_without_a_trailing_space_trained_pads_and_the_next_document(side):
    tok = tokenizer("bytes")
    rows = [encoded(tok, "12:34"), encoded(tok, "5:6"), encoded(tok, "789")]
    packed = apply_digit_lookup_mask(torch.tensor(sum(rows, [])), tok)
    assert tok.decode(packed[packed >= 0]) == "346"
    without_eos = [r[:-1] for r in rows]
    stream, borders = torch.tensor(sum(without_eos, [])), torch.tensor([0, 5, 8, 11])
    assert apply_digit_lookup_mask(stream, tok, cu_seqlens=borders).tolist() == [-100]*3 + [51, 52, -100, -100, 54, -100, -100, -100]
    batch = tok.pad(dict(input_ids=without_eos), return_tensors="pt", padding_side=side)
    labels = apply_digit_lookup_mask(batch.input_ids, tok, attention_mask=batch.attention_mask, train_eos=True)
    assert [tok.decode(r[r >= 0]) for r in labels] == ["34", "6", ""]


# ---- collator and loader ----

def test_varlen_as_transformers_flattens():
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([dict(input_ids=r) for r in rows])
    ours = DataCollatorForLanguageModelingVarLen(tokenizer("bytes"), varlen=True)(rows)
    for name in ("input_ids", "labels", "position_ids"): assert ours[name].tolist() == theirs[name].tolist()
    assert ours["cu_seqlens"].tolist() == theirs["cu_seq_lens_q"].tolist() and ours["cu_seqlens"].dtype == theirs["cu_seq_lens_q"].dtype
    assert ours["max_seqlen"] == theirs["max_length_q"]


def model():
    torch.manual_seed(0)
    latent = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
    config = PeerMLAConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, use_peer=False, mla_config=latent)
    return PeerMLAForCausalLM(config).double()


def test_a_model_has_the_same_loss_padded_and_varlen():
    tok, net, losses = tokenizer("bytes"), model(), []
    for how in (dict(varlen=True), dict(padding_side="right"), dict(padding_side="left")):
        batch = DataCollatorForLanguageModelingVarLen(tok, apply_digit_lookup_mask=True, **how)(["12:34 ", "567:89 1:2", "no value"])
        losses.append(net(**batch, num_items_in_batch=max(count_targets(batch), 1)).loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-10, atol=0)


def test_a_batch_without_targets_is_no_nan():
    tok, net = tokenizer("bytes"), model()
    for varlen in (False, True):
        batch = DataCollatorForLanguageModelingVarLen(tok, varlen=varlen, apply_qa_mask=True)(["Who?", "And you?"])
        loss = net(**batch, num_items_in_batch=max(count_targets(batch), 1)).loss
        loss.backward()
        assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in net.parameters())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_exactly(workers):
    "At every cut of two epochs, with workers that have read ahead."
    tok, show = tokenizer("bytes"), lambda batches: [b["input_ids"].tolist() for b in batches]
    make = lambda w: build_dataloader(PAIRS[:9], tok, 2, varlen=True, num_workers=w, apply_digit_lookup_mask=True)
    reference = make(0)
    whole = show([*reference, *reference])
    assert len(whole) == 2*len(reference) == 10
    cuts = range(1, 10) if workers == 0 else (3, 5)
    for cut in cuts:
        first, again = make(workers), make(workers)
        seen = []
        while len(seen) < cut:
            for _, batch in zip(range(cut - len(seen)), first): seen.append(batch)
        again.load_state_dict(first.state_dict())
        rest = []
        while len(rest) < len(whole) - cut: rest += list(again)
        assert show(seen + rest) == whole


def test_no_document_is_lost_or_repeated():
    tok, texts = tokenizer("bytes"), [f"{i}:{i} " for i in range(11)]
    seen = []
    for rank in range(2):
        for batch in build_dataloader(texts, tok, 3, rank=rank, world_size=2): seen += tok.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert len(seen) == len(set(seen)) == 10 and set(seen) < set(texts)


def test_masks_refuse_what_they_cannot_read():
    with pytest.raises(UserError, match="fast tokenizer"): Surfaces(SimpleNamespace(is_fast=False))
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="decodes by WordPiece"):
        apply_synthetic_qa_mask(torch.tensor([1]), PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]"))
