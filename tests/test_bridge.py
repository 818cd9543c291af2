"A translator between two frozen models: any pair, each loss by hand, exact after a kill, refused in one line where it cannot be."
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from children import in_child
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from peer_nb.bridge import hidden, losses, needle_models
from peer_nb.bridge.bridge import Bridge
from peer_nb.bridge.command import main
from peer_nb.bridge.items import load_items, needle_items
from peer_nb.bridge.training import BridgeTrainer, curve_summary, train_bridge
from peer_nb.config import apply_overrides, config_from_dict, save_config
from peer_nb.files import UserError, read_json, read_jsonl
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.schema import BridgeConfig, BridgeData

PEER = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128, peer_start_layer=1, initializer_range=0.1,
            peer_config=dict(num_experts=64, num_experts_per_tok=4, num_heads=2, product_key_dim=[8, 8], query_dim=16),
            mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8))


def characters(order: int) -> PreTrainedTokenizerFast:
    "A tokenizer of single characters; each order numbers them otherwise, and the odd ones begin a text with a token"
    signs = [*"abcdefghijklmnopqrstuvwxyz0123456789#!?+= "]
    signs = signs[order:] + signs[:order]
    core = Tokenizer(models.BPE({sign: n for n, sign in enumerate(["<end>", "<unknown>", "<begin>", *signs])}, [], unk_token="<unknown>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    if order % 2:
        from tokenizers.processors import TemplateProcessing
        core.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unknown>", eos_token="<end>", pad_token="<end>")


def built(kind: str, size: int):
    "A tiny model with random weights"
    torch.manual_seed(len(kind))
    ends = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    if kind == "gpt2": return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, n_positions=128, vocab_size=size, initializer_range=0.1, **ends))
    if kind == "peer": return PeerMLAForCausalLM(PeerMLAConfig(vocab_size=size, **PEER))
    common = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=size, max_position_embeddings=128, initializer_range=0.1, tie_word_embeddings=False, **ends)
    if kind == "llama": return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=32, **common))
    return MistralForCausalLM(MistralConfig(hidden_size=32, intermediate_size=32, sliding_window=None, **common))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Folders of tiny models by kind"
    place = tmp_path_factory.mktemp("models")
    for order, kind in enumerate(("llama", "gpt2", "mistral", "peer")):
        tokenizer = characters(order)
        built(kind, len(tokenizer)).save_pretrained(place/kind)
        tokenizer.save_pretrained(place/kind)
    return place


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(pair, out, source="mistral", target="llama", *more):
    "A run of six steps"
    bridge = dict(source=dict(model=str(pair/source)), target=dict(model=str(pair/target)), translator=dict(soft_tokens=3, depth=1, bottleneck=16, heads=2, dropout=0.1),
                  data=dict(train_items=24, validation_items=6, test_items=6), evaluate=dict(curve_items=4, max_new_tokens=3))
    train = dict(output_dir=str(out), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-2, eval_steps=2, logging_steps=1, save_steps=3)
    return apply_overrides(config_from_dict(dict(bridge_config=bridge, train_config=train)), list(more))


def opened(bridge):
    "Gates half open, as after some training"
    with torch.no_grad():
        for block in bridge.translator.blocks: block.gates.fill_(0.5)
    return bridge


# ---- any pair -----------------------------------------------------------------------------------------------------------

PAIRS = [("mistral", "llama"), ("llama", "gpt2"), ("gpt2", "peer"), ("peer", "mistral")]


@pytest.mark.parametrize("source, target", PAIRS)
@pytest.mark.parametrize("mode", ["prepend", "residual"])
def test_a_batch_gives_what_single_items_give(pair, tmp_path, source, target, mode):
    "Soft tokens, losses and answers, of prompts and texts of several lengths"
    torch.manual_seed(0)
    bridge = opened(Bridge.new(config(pair, tmp_path, source, target, f"bridge_config.translator.mode={mode}")))
    items = needle_items(bridge.options, "test", 3)
    items = [item.__class__(**vars(item) | dict(source_prompt=item.source_prompt[:10 + 5*n], instruction="sum"[:3] + "="*n)) for n, item in enumerate(items)]
    soft = bridge.soft_tokens(items)
    single = [bridge.soft_tokens([item]) for item in items]
    torch.testing.assert_close(soft, torch.cat(single), rtol=1e-4, atol=1e-5)
    assert bridge.generate(items, soft) == [bridge.generate([item], one)[0] for item, one in zip(items, single)]
    texts = bridge.texts(items)
    sizes = [len(row) for row in losses.answer_rows(bridge, texts, items)[1]]
    together = losses.answer_nll(*losses._logits_and_labels(losses.answered(bridge, texts, items, soft)))
    alone = [losses.answer_nll(*losses._logits_and_labels(losses.answered(bridge, [text], [item], one))) for text, item, one in zip(texts, items, single)]
    torch.testing.assert_close(together, sum(n*loss for n, loss in zip(sizes, alone))/sum(sizes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("source, target", PAIRS)
def test_both_models_stay_as_they_are(pair, tmp_path, source, target):
    "To the bit, after training with every loss"
    names = ("kl", "prompt_alignment", "decode", "rope_projection")
    trainer = BridgeTrainer(config(pair, tmp_path/"run", source, target, *[f"bridge_config.losses.{name}.on=true" for name in names]))
    tensors = lambda: {f"{end}.{name}": value.clone() for end in ("source", "target") for name, value in getattr(trainer.bridge, end).state_dict().items()}
    before, first = tensors(), {name: value.clone() for name, value in trainer.translator.state_dict().items()}
    found = [trainer.step() for _ in range(3)]
    after = tensors()
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert all({*names, "nll", "loss", "grad_norm"} == {*losses} and all(map(math.isfinite, losses.values())) for losses in found)
    assert not all(value.equal(first[name]) for name, value in trainer.translator.state_dict().items())


# ---- losses by other means ---------------------------------------------------------------------------------------------

def double(bridge):
    for name in ("source", "target", "translator"): getattr(bridge, name).double()
    return bridge


@pytest.mark.parametrize("target", ["llama", "gpt2"])
def test_losses_are_those_of_the_models_own_words(pair, tmp_path, target):
    "In float64, one item at a time: transformers' logits after a text, its cache; formulas written out"
    on = [f"bridge_config.losses.{name}.on=true" for name in ("kl", "prompt_alignment", "decode", "rope_projection", "info_nce")]
    torch.manual_seed(1)
    bridge = double(opened(Bridge.new(config(pair, tmp_path, "mistral", target, *on, "train_config.per_device_train_batch_size=32"))))
    items, t, model = needle_items(bridge.options, "train", 3), bridge.target_tokenizer, bridge.target
    states, mask = bridge.hidden_states([item.source_prompt for item in items])
    soft = bridge.translator(states.double(), mask).detach()
    bridge.translator.forward = lambda *_: soft
    ours = losses.bridge_losses(bridge, items, states, mask)
    begin, embed, want = t("")["input_ids"], model.get_input_embeddings().weight, dict.fromkeys(ours, 0.0)
    prompts = [t(item.target_prompt, add_special_tokens=False)["input_ids"] for item in items]
    shared = len(os.path.commonprefix(prompts))
    means = [embed[row[shared:]].mean(0) for row in prompts]
    for n, item in enumerate(items):
        answer = t(item.answer, add_special_tokens=False)["input_ids"] + [0]
        def read(before, after):
            vectors = torch.cat([embed[begin], *before, embed[after + answer]])[None]
            return model(inputs_embeds=vectors, use_cache=True)
        def surprise(out): return -out.logits[0, -len(answer) - 1:-1].log_softmax(-1)[range(len(answer)), answer].mean()
        bridged, prompted = read([soft[n]], t(item.instruction, add_special_tokens=False)["input_ids"]), read([], prompts[n])
        want["nll"] += surprise(bridged)/3
        want["decode"] += surprise(read([soft[n]], prompts[n]))/3
        p, q = (out.logits[0, -len(answer) - 1:-1].softmax(-1) for out in (prompted, bridged))
        want["kl"] += (p*(p.log() - q.log())).sum()/len(answer)/3
        want["prompt_alignment"] += (soft[n] - embed[prompts[n][:3]]).pow(2).mean()/3
        keys = [out.past_key_values.layers[0].keys[0, :, len(begin):len(begin) + 3] for out in (bridged, prompted)]
        want["rope_projection"] += (keys[0] - keys[1]).pow(2).mean()/3
        scores = torch.stack([torch.cosine_similarity(soft[n].mean(0), mean, dim=0)/0.07 for mean in means])
        want["info_nce"] -= scores.log_softmax(0)[n]/3
    for name in want: torch.testing.assert_close(ours[name], want[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_a_shared_beginning_says_nothing(pair, tmp_path):
    "With the prefix left in, the same prompts look alike, and the loss of soft tokens that know them is far larger"
    bridge = opened(Bridge.new(config(pair, tmp_path)))
    items = needle_items(bridge.options, "train", 8)
    rows = bridge.text_rows(["the same long beginning of all prompts " + item.target_prompt for item in items])
    bare = losses.without_shared_prefix(rows)
    assert [row[-len(short):] for row, short in zip(rows, bare)] == bare and min(map(len, bare)) >= len(items[0].target_prompt) - 5
    means = lambda rows: torch.stack([bridge.embeddings.weight[row].mean(0) for row in rows])
    same = torch.eye(8, dtype=torch.bool)
    with_prefix, without = (losses.info_nce(means(r), means(r), same).item() for r in (rows, bare))
    assert without < with_prefix/2


# ---- a run ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def undisturbed(pair, tmp_path_factory):
    return train_bridge(config(pair, tmp_path_factory.mktemp("run")/"straight"), progress=False)


def lines_of(folder) -> list[dict]:
    "Metrics without what a clock says"
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_jsonl(folder/"metrics.jsonl")]


def weights_of(folder) -> dict:
    from safetensors.torch import load_file
    return load_file(folder/"model.safetensors")


def assert_same_end(folder, straight):
    assert lines_of(folder) == lines_of(straight)
    for name in ("checkpoint-6", "selected"):
        one, two = weights_of(folder/name), weights_of(straight/name)
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    assert {k: v for k, v in read_json(folder/"bridge.json").items() if k != "seconds"} == {k: v for k, v in read_json(straight/"bridge.json").items() if k != "seconds"}


def killed_after(cfg, step: int):
    "Train, and die at once after a step that was told but not saved"
    def report(self, *args, known=BridgeTrainer.report):
        known(self, *args)
        if self.done.step == step: os.kill(os.getpid(), signal.SIGKILL)
    BridgeTrainer.report = report
    train_bridge(cfg, progress=False)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_bit(pair, undisturbed, tmp_path):
    cfg = config(pair, tmp_path/"run")
    in_child(killed_after, cfg, 5, ends=-signal.SIGKILL)
    assert lines_of(tmp_path/"run")[-1]["step"] == 5
    with pytest.raises(UserError, match="holds checkpoint-3"): train_bridge(cfg, progress=False)
    train_bridge(cfg, resume=True, progress=False)
    assert_same_end(tmp_path/"run", undisturbed.folder)


def test_a_finished_run_takes_no_further_step(undisturbed):
    before = (undisturbed.folder/"metrics.jsonl").read_text()
    again = train_bridge(undisturbed.bridge.cfg, resume=True, progress=False)
    assert again.summary["steps"] == 6 and (undisturbed.folder/"metrics.jsonl").read_text() == before


def test_a_stopped_run_is_saved(pair, undisturbed, tmp_path, monkeypatch):
    cfg, step = config(pair, tmp_path/"run"), BridgeTrainer.step
    def stopping(self):
        if self.done.step == 3: os.kill(os.getpid(), signal.SIGTERM)
        return step(self)
    monkeypatch.setattr(BridgeTrainer, "step", stopping)
    with pytest.raises(SystemExit) as info: train_bridge(cfg, progress=False)
    assert info.value.code == 75 and (tmp_path/"run"/"checkpoint-4").is_dir()
    monkeypatch.undo()
    train_bridge(cfg, resume=True, progress=False)
    assert lines_of(tmp_path/"run") == lines_of(undisturbed.folder)


def test_what_is_loaded_is_what_was_trained(undisturbed):
    last, items = Bridge.load(undisturbed.folder, "last"), needle_items(undisturbed.bridge.options, "test", 4)
    torch.testing.assert_close(last.soft_tokens(items), undisturbed.bridge.soft_tokens(items), rtol=0, atol=0)
    chosen = undisturbed.summary["selected_step"]
    assert read_json(undisturbed.folder/"selected"/"trainer_state"/"about.json")["step"] == chosen
    assert not (undisturbed.folder/"selected"/"trainer_state"/"optimizer.pt").exists()
    with pytest.raises(UserError, match="no translator of step 99 there; kept: selected, 3, 6, last"): Bridge.load(undisturbed.folder, 99)


def test_a_translator_that_is_damaged_or_between_other_models_answers_nothing(pair, tmp_path, capsys):
    import shutil
    models = shutil.copytree(pair, tmp_path/"models")
    run = train_bridge(config(models, tmp_path/"run", "mistral", "llama"), progress=False).folder
    def said() -> str:
        capsys.readouterr()
        assert main(["evaluate", str(run), "--items", "2", "--output", str(tmp_path/"new"/"deep")]) == 2 and not (tmp_path/"new").exists()
        return capsys.readouterr().err
    file = run/"selected"/"model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert "selected is damaged: model.safetensors has" in said()
    file.write_bytes(whole)
    weights = load_file(file)
    (run/"selected"/"trainer_state"/"files.json").unlink()   # as a copy without its seal
    save_file({name: value for name, value in weights.items() if name != "queries"}, file, metadata=dict(format="pt"))
    assert "lacks 1 of the model's weights, such as queries" in said()
    save_file(weights | dict(queries=weights["queries"]*torch.nan), file, metadata=dict(format="pt"))
    assert "queries has numbers that are not finite" in said()
    file.write_bytes(whole)
    changed = built("llama", len(characters(0)))
    with torch.no_grad(): changed.model.norm.weight.mul_(2)
    changed.save_pretrained(models/"llama")
    assert "was trained between other models: the weights of its target have changed since" in said()


def test_controls_read_another_item_or_nothing(undisturbed):
    bridge, items = undisturbed.bridge, needle_items(undisturbed.bridge.options, "test", 5)
    own, shuffled, zero = (bridge.soft_tokens(items, kind, rows=2) for kind in ("own", "shuffled", "zero"))
    torch.testing.assert_close(shuffled, torch.cat([own[1:], own[:1]]), rtol=1e-4, atol=1e-5)
    assert (own[0] - own[1]).abs().max() > 1e-6
    torch.testing.assert_close(zero, zero[:1].expand_as(zero), rtol=1e-5, atol=1e-6)


def test_files_of_hidden_states_change_nothing(pair, undisturbed, tmp_path, monkeypatch):
    "A run without them ends in the same weights; one that finds them does not ask the source"
    train_bridge(config(pair, tmp_path/"fresh", "mistral", "llama", "bridge_config.data.cache_hidden=false"), progress=False)
    for name, value in weights_of(tmp_path/"fresh"/"checkpoint-6").items(): assert value.equal(weights_of(undisturbed.folder/"checkpoint-6")[name])
    monkeypatch.setattr(hidden, "read_prompts", lambda *_: pytest.fail("the source was asked again"))
    assert isinstance(BridgeTrainer(config(pair, tmp_path/"again")).hidden["train"].numbers, np.memmap)


def test_validation_alone_chooses(pair, tmp_path, monkeypatch):
    "The step of the best validation curve is kept, whatever the test curve does; patience counts evaluations without a better one"
    curve = {1: (.2, .9), 2: (.5, .1), 3: (.4, .95), 4: (.5, .99), 5: (.6, 1.0)}
    def told(self):
        right, test = curve[self.done.step]
        return {"eval/validation/exact_match": right, "eval/validation/loss": 1.0} | {f"eval/{split}/exact_match": test for split in ("test", "test_held_out")}
    monkeypatch.setattr(BridgeTrainer, "evaluate", told)
    cfg = config(pair, tmp_path/"run", "mistral", "llama", "train_config.eval_steps=1", "bridge_config.evaluate.patience=2")
    found = train_bridge(cfg, progress=False).summary
    assert (found["steps"], found["stopped_early"], found["selected_step"]) == (4, True, 2)
    assert found["test"] == dict(peak_step=4, peak=.99, last=.99, selected=.1, degradation=0.0)
    assert read_json(tmp_path/"run"/"selected"/"trainer_state"/"about.json")["step"] == 2
    assert curve_summary(read_jsonl(tmp_path/"run"/"metrics.jsonl"), 2)["validation"]["peak_step"] == 2


def test_other_models_are_not_gone_on_with(pair, tmp_path):
    import shutil
    models = shutil.copytree(pair, tmp_path/"models")
    cfg = config(models, tmp_path/"run", "mistral", "llama", "train_config.keep_optimizer_state=true")
    train_bridge(cfg, progress=False)
    changed = built("llama", len(characters(0)))
    with torch.no_grad(): changed.model.norm.weight.mul_(2)
    changed.save_pretrained(models/"llama")
    with pytest.raises(UserError, match="trained between other models"): train_bridge(cfg, resume=True, progress=False)


# ---- what cannot be meant ----------------------------------------------------------------------------------------------

BAD = {
    "a layer that is not there": ("bridge_config.source.layer=3", "bridge_config.source.layer: 3 is not a layer"),
    "more soft tokens than the target reads": ("bridge_config.translator.soft_tokens=128", "128 soft tokens and an answer of 3 do not fit into the target's context of 128 tokens"),
    "InfoNCE in a batch of two": (["bridge_config.losses.info_nce.on=true", "train_config.per_device_train_batch_size=2"], "losses.info_nce: tells the items of a batch apart, which 2 items hardly need"),
    "heads that do not divide": ("bridge_config.translator.heads=3", "translator.bottleneck: 16 does not divide evenly among heads = 3"),
    "no loss": ("bridge_config.losses.nll.on=false", "losses: none of them is on"),
    "a key of other trainings": ("train_config.fp8=true", "train_config.fp8: True is not read by a bridge"),
    "no model": ("bridge_config.source.model=needle:middle", "the two that can be made are needle:source, needle:target"),
    "residual on a short text": ("bridge_config.translator.mode=residual", "residual adds 3 soft tokens to a text of 1"),
    "a field that no item has": (["bridge_config.source.prompt='{story}'", "bridge_config.data.task=gsm8k", "bridge_config.data.path=DATA"], "'story' is no field of an item; known: question, context"),
    "no file": (["bridge_config.data.task=gsm8k", "bridge_config.data.path=nowhere"], "nowhere: no such file or folder"),
    "a data set without answers": (["bridge_config.data.task=gsm8k", "bridge_config.data.path=EMPTY"], "line 1 has no answer"),
    "an answer that is no text": (["bridge_config.data.task=gsm8k", "bridge_config.data.path=NUMBERS"], "line 1 has no answer"),
    "a row that is no object": (["bridge_config.data.task=gsm8k", "bridge_config.data.path=LISTS"], "line 1: 3 is no object of named values"),
    "not UTF-8": (["bridge_config.data.task=gsm8k", "bridge_config.data.path=LATIN"], "line 1: not UTF-8"),
    "paragraphs of another layout": (["bridge_config.data.task=hotpotqa", "bridge_config.data.path=COLUMNS"], "its context is no list of [title, [sentence, ...]]"),
    "items that are there twice": (["bridge_config.data.task=hotpotqa", "bridge_config.data.path=TWICE"], "60 items are there more than once, such as 0; leave out the file"),
    "a tokenizer of another model": ("bridge_config.target.model=OTHER", "the tokenizer does not match the model"),
}


@pytest.mark.parametrize("words, said", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(pair, tmp_path, capsys, words, said):
    import shutil
    (tmp_path/"data").mkdir()
    (tmp_path/"data"/"train.jsonl").write_text("".join(json.dumps(dict(question=f"{n}?", answer=f"so\n#### {n}")) + "\n" for n in range(60)))
    (tmp_path/"empty.jsonl").write_text(json.dumps(dict(question="How many?")) + "\n")
    shutil.copytree(pair/"llama", tmp_path/"other")
    many = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({f"w{n}": n for n in range(999)}, unk_token="w0")), unk_token="w0", eos_token="w1", pad_token="w1")
    many.save_pretrained(tmp_path/"other")
    file = save_config(config(pair, tmp_path/"run"), tmp_path/"bridge.yaml")
    words = [words] if isinstance(words, str) else words
    (tmp_path/"numbers.jsonl").write_text('{"question": "How many?", "answer": 5}\n')
    (tmp_path/"lists.jsonl").write_text("[3]\n")
    (tmp_path/"latin.jsonl").write_bytes(b'{"question": "Gr\xf6\xdfe?"}\n')
    (tmp_path/"columns.json").write_text(json.dumps([dict(_id="a", question="Who?", answer="I", context=dict(title=["t"], sentences=[["s"]]))]))
    (tmp_path/"twice").mkdir()
    for name in ("hotpot_dev_distractor", "hotpot_dev_fullwiki", "hotpot_train"):
        (tmp_path/"twice"/f"{name}.json").write_text(json.dumps([dict(_id=f"{n + 1000*(name == 'hotpot_train')}", question="Who?", answer="I") for n in range(60)]))
    places = dict(DATA="data", EMPTY="empty.jsonl", OTHER="other", NUMBERS="numbers.jsonl", LISTS="lists.jsonl", LATIN="latin.jsonl", COLUMNS="columns.json", TWICE="twice")
    for name, path in places.items(): words = [word.replace(name, str(tmp_path/path)) for word in words]
    assert main(["train", "--config", str(file), *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err


def test_the_last_line_of_a_file_needs_no_end(tmp_path):
    "As many editors write it; a log's last line would be a torn one"
    rows = [json.dumps(dict(question=f"{n}?", answer=f"so\n#### {n}")) for n in range(60)]
    (tmp_path/"train.jsonl").write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    found = load_items(BridgeConfig(data=BridgeData(task="gsm8k", path=str(tmp_path))))
    assert sorted(int(item.gold) for items in found.values() for item in items) == list(range(60))


def test_a_damaged_checkpoint_is_named_and_the_one_before_continued(pair, tmp_path, capsys):
    cfg = config(pair, tmp_path/"run", "mistral", "llama", "train_config.max_steps=4", "train_config.save_steps=2", "train_config.keep_optimizer_state=true", "train_config.save_total_limit=9")
    file = save_config(cfg, tmp_path/"bridge.yaml")
    whole = train_bridge(cfg, progress=False)
    weights = (tmp_path/"run"/"checkpoint-4"/"model.safetensors").read_bytes()
    (tmp_path/"run"/"checkpoint-4"/"model.safetensors").write_bytes(weights[:-8])
    assert main(["train", "--config", str(file), "--resume"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint-4 is damaged" in said and f"--resume {tmp_path/'run'/'checkpoint-2'}" in said
    assert main(["train", "--config", str(file), "--resume", str(tmp_path/"run"/"checkpoint-2")]) == 0
    assert (tmp_path/"run"/"checkpoint-4"/"model.safetensors").read_bytes() == weights
    assert read_json(tmp_path/"run"/"bridge.json")["steps"] == whole.summary["steps"] == 4


def test_the_command_trains(pair, tmp_path, capsys, caplog):
    file = save_config(config(pair, tmp_path/"elsewhere"), tmp_path/"bridge.yaml")
    assert main(["train", "--config", str(file), "--output-dir", str(tmp_path/"run"), "train_config.max_steps=2"]) == 0
    out = capsys.readouterr().out + caplog.text
    assert "step 2/2" in out and "left" in out and "selected" in out and "test_held_out" in out
    assert {"bridge.json", "metrics.jsonl", "heartbeat.json", "selected", "checkpoint-2"} <= {path.name for path in (tmp_path/"run").iterdir()}


# ---- the two models of the needle task ------------------------------------------------------------------------------------

def test_a_model_that_learned_nothing_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path))
    monkeypatch.setitem(needle_models.STEPS, "target", 1)
    with pytest.raises(UserError, match="has learned 0% of its lesson"): needle_models.make_needle("target")
    assert not needle_models.cached_needle("target").exists()


def test_lessons_teach_the_answers_only():
    for name, answer in dict(source=3, target=2).items():
        tokenizer = needle_models.needle_tokenizer(name)
        batch = needle_models.lesson_batch(name, 0, 4, tokenizer)
        for ids, labels in zip(batch["input_ids"], batch["labels"]):
            taught = "".join(tokenizer.decode(ids[labels != -100]).split("<end>"))
            lesson = "".join(needle_models.LESSONS[name](0, 4)[[*map(tuple, batch["input_ids"].tolist())].index(tuple(ids.tolist()))][1::2])
            assert taught == lesson and (labels[labels != -100] == ids[labels != -100]).all()
