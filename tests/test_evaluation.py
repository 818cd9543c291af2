"The held-out scores against lm-evaluation-harness, and what must hold for any document and window."
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_nb.config import DatasetConfig, MLAConfig, ModelConfig, PeerConfig, to_dict, Config
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.perplexity import score_documents, score_windows
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM

TEXTS = ["A short one.", "x", "Grüße aus Köln – ≠ 日本語", "def f(x):\n    return x + 1\n" * 9, "word " * 64, "exactly thirty-two bytes long ok"]


@pytest.fixture(scope="module")
def model() -> PeerMLAForCausalLM:
    peer = PeerConfig(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="batch")
    cfg = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=260, initializer_range=0.3,
                      max_position_embeddings=32, peer_start_layer=1, peer_config=peer, mla_config=MLAConfig(None, 16, 8, 16, 8))
    torch.manual_seed(0)
    return PeerMLAForCausalLM(PeerMLAConfig(**to_dict(Config(cfg))["model_config"])).eval()


@pytest.fixture(scope="module")
def tokenizer(): return load_tokenizer(DatasetConfig(tokenizer_name="bytes"))


@pytest.mark.parametrize("window", [32, 7])
def test_equals_lm_eval_rolling_loglikelihood(model, tokenizer, window):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)
    from lm_eval.api.instance import Instance
    # its cache takes two windows of the same tokens for one, even when they score different parts of them
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=window, device="cpu", logits_cache=False)
    requests = [Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0) for text in TEXTS]
    expected = -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True))
    score = score_documents(model, tokenizer, TEXTS, window=window, batch_size=4)
    size = sum(len(text.encode()) for text in TEXTS)
    assert score.loss * score.tokens == pytest.approx(expected, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / size, rel=1e-6)
    assert (score.bytes, score.documents, score.window) == (size, len(TEXTS), window)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(0, 9), max_size=60), window=st.integers(1, 70), data=st.data())
def test_every_token_is_a_target_once(tokens, window, data):
    sequence, targets, stride = [-1, *tokens], [], data.draw(st.integers(1, window))
    for piece, skip in score_windows(tokens, window, first=-1, stride=stride):
        start = len(targets) - skip
        assert piece == sequence[start:start + len(piece)]                 # a stretch of the document, in its place
        assert len(piece) - 1 == min(window, len(tokens))                  # as much context as the window gives
        assert start == 0 or skip >= window - stride                       # what a stride promises
        targets += piece[1 + skip:]
    assert targets == tokens


@pytest.mark.parametrize("stride, length", [(8, 40), (16, 64), (31, 100)])
def test_equals_the_strided_loop_of_the_transformers_guide(model, tokenizer, stride, length):
    "Windows that begin at multiples of the stride, labels of the overlap masked, losses weighted by their targets"
    window, text = 31, ("abcdefghij" * 20)[:length]
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    total, count, seen = 0.0, 0, 1
    for begin in range(0, ids.size(1), stride):
        end = min(begin + window + 1, ids.size(1))
        if end == ids.size(1): begin = max(0, end - window - 1)            # the last window is as long as the others
        piece, labels = ids[:, begin:end], ids[:, begin:end].clone()
        labels[:, :seen - begin] = -100
        with torch.no_grad(): loss = model(input_ids=piece, labels=labels).loss.double().item()
        total, count, seen = total + loss*(end - seen), count + end - seen, end
        if end == ids.size(1): break
    score = score_documents(model, tokenizer, [text], window=window, batch_size=3, stride=stride)
    assert (score.tokens, score.stride) == (count, stride)
    assert score.loss == pytest.approx(total / count, rel=1e-5)


def test_counts_words_and_bytes_as_lm_eval_does(model, tokenizer):
    task = pytest.importorskip("lm_eval.api.task", exc_type=ImportError)
    score = score_documents(model, tokenizer, TEXTS, window=32, batch_size=4, resamples=200)
    assert (score.words, score.bytes) == (sum(map(task.Task.count_words, TEXTS)), sum(map(task.Task.count_bytes, TEXTS)))
    assert score.word_perplexity == pytest.approx(math.exp(score.loss*score.tokens / score.words))
    assert score.bits_per_byte_ci[0] < score.bits_per_byte < score.bits_per_byte_ci[1]


def test_any_causal_model_of_transformers(tokenizer, tmp_path):
    "A GPT-2 from a folder: the command, its JSON and its page"
    from transformers import GPT2Config, GPT2LMHeadModel

    from peer_nb.evaluation.command import main
    from peer_nb.files import read_json
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path/"a.txt").write_text("Nothing is so clear as a number with its error.\n" * 9)
    assert main(["perplexity", str(tmp_path), "--files", str(tmp_path/"a.txt"), "--output", str(tmp_path/"scores.json")]) == 0
    score, = read_json(tmp_path/"scores.json")["texts"].values()
    assert score["window"] == 64 and score["bytes"] == (tmp_path/"a.txt").stat().st_size and "<svg" in (tmp_path/"scores.html").read_text()


def test_running_statistics_are_used_and_kept(model, tokenizer):
    "Scores of a model with batch statistics do not depend on what shares its batch, and scoring does not change them"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone = [score_documents(model, tokenizer, [text], window=16, batch_size=1) for text in TEXTS]
    model.train()
    together = score_documents(model, tokenizer, TEXTS, window=16, batch_size=64)
    assert model.training
    model.eval()
    assert together.loss * together.tokens == pytest.approx(sum(s.loss * s.tokens for s in alone), rel=1e-6)
    for name, value in model.state_dict().items(): assert torch.equal(value, before[name]), name
