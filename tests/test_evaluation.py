"The held-out scores against lm-evaluation-harness, what must hold for any document and window, and what must not be scored."
import json
import math
import os
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_nb.config import Config, DatasetConfig, DatasetEntry, EvalConfig, MLAConfig, ModelConfig, PeerConfig, to_dict
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.loading import check_tokenizer, load_model
from peer_nb.evaluation.perplexity import evaluate_heldout, score_documents, score_windows
from peer_nb.files import UserError, folder_lock, read_json, seal_folder
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
    assert score["window"] == 64 and score["bytes"] == (tmp_path/"a.txt").stat().st_size and (tmp_path/"scores.html").exists()


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


# ---- what must not be scored ----

OTHERS = dict(   # a tiny model of each kind of transformers: configuration
    gpt2=dict(n_embd=16, n_layer=1, n_head=2, n_positions=64), opt=dict(hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16),
    gpt_neo=dict(hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=64, attention_types=[[["global"], 1]]),
    llama=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64),
    mixtral=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64),
    bloom=dict(hidden_size=16, n_layer=1, n_head=2), mamba=dict(hidden_size=16, num_hidden_layers=1, state_size=4), mamba2=dict(hidden_size=16, num_heads=4, head_dim=8, num_hidden_layers=1, state_size=4, n_groups=1),
    mpt=dict(d_model=16, n_layers=1, n_heads=2, max_seq_len=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    "Makes a folder with a tiny model of a kind"
    from transformers import AutoConfig, AutoModelForCausalLM
    def make(kind: str, name: str = ""):
        place = tmp_path_factory.mktemp("models")/(name or kind)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=257, **OTHERS[kind])).save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place/"t.txt").write_text("The quick brown fox. " * 30)
        return place
    return make


def peer_eval(*words) -> int:
    from peer_nb.evaluation.command import main
    return main([str(w) for w in words])


@pytest.mark.parametrize("kind", OTHERS)
def test_models_and_layouts_of_others(folder, kind, capsys):
    "Scored as they are; a window that the model cannot read, or does not say, is refused in one line"
    place = folder(kind)
    endless = kind in ("bloom", "mamba", "mamba2")
    assert peer_eval("perplexity", place, "--files", place/"t.txt", "--output", place/"a.json") == (2 if endless else 0)
    assert peer_eval("perplexity", place, "--files", place/"t.txt", "--window", 256, "--output", place/"b.json") == (0 if endless else 2)
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "--window" in said and "Traceback" not in said
    assert 7 < next(iter(read_json(place/("b.json" if endless else "a.json"))["texts"].values()))["bits_per_byte"] < 9


def test_consolidated_weights_beside_shards(folder):
    "The layout of some models on the hub: shards that an index names, and a file that it does not"
    from safetensors.torch import load_file, save_file
    place = folder("llama")
    weights = load_file(place/"model.safetensors")
    before, _ = load_model(place)
    save_file(weights, place/"model-00001-of-00001.safetensors", metadata=dict(format="pt"))
    (place/"model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=dict.fromkeys(weights, "model-00001-of-00001.safetensors"))))
    (place/"model.safetensors").unlink()
    save_file({"tok_embeddings.weight": weights["model.embed_tokens.weight"].clone()}, place/"consolidated.safetensors")
    after, _ = load_model(place)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def spoilt(place, how: str):
    "Spoil a folder in one way"
    from safetensors.torch import load_file, save_file
    weights, own = load_file(place/"model.safetensors"), json.loads((place/"config.json").read_text())
    if how == "half": weights = {k: v for k, v in weights.items() if "mlp" not in k}
    if how == "wrapped": weights = {f"_orig_mod.{k}": v for k, v in weights.items()}
    if how == "nan": weights["model.norm.weight"][0] = float("nan")
    save_file(weights, place/"model.safetensors", metadata=dict(format="pt"))
    if how == "no tokenizer": [f.unlink() for f in place.glob("*token*")]
    if how == "code": (place/"config.json").write_text(json.dumps(own | dict(model_type="own", auto_map=dict(AutoConfig="own.C", AutoModelForCausalLM="own.M")))); (place/"own.py").write_text("open('ran', 'w')")
    if how == "pickle": (place/"model.safetensors").unlink(); (place/"pytorch_model.bin").write_bytes(b"cos\ngetcwd\n(tR.")
    if how == "damaged":
        (place/"trainer_state").mkdir(); seal_folder(place)
        data = bytearray((place/"model.safetensors").read_bytes()); data[-1] ^= 1
        (place/"model.safetensors").write_bytes(data)


SPOILT = {"half": "lacks 6 of the model's weights", "wrapped": "_orig_mod.", "nan": "not finite", "no tokenizer": "spoilt:", "code": "custom code", "pickle": "cannot be loaded", "damaged": "model.safetensors was changed"}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("command", ["perplexity", "benchmark", "recall"])
def test_every_command_refuses_what_one_refuses(folder, tmp_path, capsys, monkeypatch, how, command):
    "One line, exit code 2, and nothing of it was scored or run, whoever answers yes"
    from peer_nb.evaluation.items import write_hub_shape
    from peer_nb.tasks.writing import write_task
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    place = folder("llama", "spoilt")
    spoilt(place, how)
    words = dict(perplexity=["--files", place/"t.txt"], benchmark=["hellaswag", "--data-root", tmp_path], recall=[tmp_path/"d"])[command]
    if command == "benchmark":
        pytest.importorskip("lm_eval")
        scene = dict(activity_label="Counting", ctx_a="Somebody counts.", ctx_b="he", endings=[*"abcd"], label="0")
        write_hub_shape({"default": dict(train=[scene], validation=[scene]*4)}, tmp_path/"Rowan"/"hellaswag")
    if command == "recall": write_task("digit_lookup", tmp_path/"d", num_pairs=20, num_known=5, num_novel=5)
    output = tmp_path/"new"/"deep"
    assert peer_eval(command, place, *words, "--output", output/"s.json" if command == "perplexity" else output) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and SPOILT[how] in said and "Traceback" not in said
    assert not (tmp_path/"ran").exists() and not (tmp_path/"new").exists()


def test_a_tokenizer_with_gaps_is_judged_by_its_highest_token(model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    gappy = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 900}, unk_token="a")), eos_token="a")
    assert len(gappy) < 260
    with pytest.raises(UserError, match="tokens up to 900"): check_tokenizer(model, gappy)
    with pytest.raises(UserError, match="tokens up to 900"): score_documents(model, gappy, ["b"], window=8, batch_size=1)


def test_activations_that_overflow_are_no_score(model, tokenizer):
    "Weights that are finite, log-likelihoods that are not"
    wild = type(model)(model.config).eval()
    wild.load_state_dict(model.state_dict())
    with torch.no_grad(): wild.lm_head.weight.fill_(3e38)
    with pytest.raises(UserError, match="not finite"): score_documents(wild, tokenizer, TEXTS, window=16, batch_size=4)


# ---- files of the command ----

def test_two_scorings_never_share_an_output(folder, tmp_path):
    place = folder("llama")
    with folder_lock(tmp_path, name=".s.json.lock"):
        assert peer_eval("perplexity", place, "--files", place/"t.txt", "--output", tmp_path/"s.json") == 2
        assert peer_eval("perplexity", place, "--files", place/"t.txt", "--output", tmp_path/"other.json") == 0
    assert peer_eval("perplexity", place, "--files", place/"t.txt", "--output", tmp_path/"s.json") == 0


@pytest.mark.parametrize("name", ["notes.txt", "page.html", "results.json", "link.json"])
def test_files_of_others_stay(folder, tmp_path, name, capsys):
    place = folder("llama")
    (tmp_path/"notes.txt").write_text("Dear all"); (tmp_path/"page.html").write_text("<p>"); (tmp_path/"results.json").write_text('{"kind": "mine"}')
    (tmp_path/"link.json").symlink_to("/dev/full")
    before = {f.name: os.stat(f).st_mtime_ns for f in tmp_path.iterdir()}
    output = tmp_path/(name if name != "page.html" else "page.json")       # whose page would be page.html
    assert peer_eval("perplexity", place, "--files", place/"t.txt", "--output", output) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert {f.name: os.stat(f).st_mtime_ns for f in tmp_path.iterdir()} == before


@pytest.fixture
def full_disk(monkeypatch):
    "Once it is called, no file of this process grows beyond some bytes; until the test ends"
    import resource
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line(folder, tmp_path, full_disk, monkeypatch, capsys):
    from peer_nb.evaluation import perplexity_command
    place, real = folder("llama"), perplexity_command.score_sources
    monkeypatch.setattr(perplexity_command, "score_sources", lambda *a, **k: full_disk(200) or real(*a, **k))
    files = [shutil.copy(place/"t.txt", tmp_path/f"{i}.txt") for i in range(4)]
    assert peer_eval("perplexity", place, "--files", *files, "--output", tmp_path/"s.json") == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "s.documents.jsonl: cannot be written: File too large" in said


def test_the_configured_batch_size_is_used(model, tokenizer, tmp_path, monkeypatch):
    "eval_config.eval_batch_size: rows of a forward pass of held-out scoring, of recall, and of the command"
    rows = []
    monkeypatch.setattr(type(model), "forward", lambda self, *a, real=type(model).forward, **k: rows.append(len(k["input_ids"])) or real(self, *a, **k))
    (tmp_path/"a.jsonl").write_text("".join(json.dumps(dict(text=f"some words {i}")) + "\n" for i in range(40)))
    entries = [DatasetEntry("a", str(tmp_path/"a.jsonl"), format="json"), DatasetEntry("facts", task="digit_lookup", task_arguments='{"num_pairs": 12, "num_known": 12, "num_novel": 0}')]
    for size in (3, 5):
        cfg = Config(dataset_config=DatasetConfig(datasets=entries[:1], tokenizer_name="bytes", max_seq_length=24, heldout_fraction=0.5), eval_config=EvalConfig(eval_batch_size=size))
        evaluate_heldout(model, tokenizer, cfg)
        assert max(rows) == size; rows.clear()
