"A bridge's answers, sizes and arms: by published rules, by other people's code, by the real cache."
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from jsonschema import validate
from tiny_bridge import write_ends

from peer_nb.bridge.answers import grade, normal_words, read_number, trimmed, words_f1
from peer_nb.bridge.arms import ARMS, partners, possible_arms
from peer_nb.bridge.bridge import Bridge
from peer_nb.bridge.command import main
from peer_nb.bridge.evaluation import SAMPLE_SCHEMA, Asking, ask_arms, answer_lines, turns
from peer_nb.bridge.generation import continued, embedded, quantised, soft_bytes
from peer_nb.bridge.kv_bytes import cache_bytes, cache_kind, real_cache_bytes, saved_text
from peer_nb.bridge.items import load_items, needle_items
from peer_nb.bridge.training import train_bridge
from peer_nb.config import apply_overrides, config_from_dict, save_config
from peer_nb.files import UserError, append_jsonl, read_jsonl
from peer_nb.models.causal_lm import PeerMLAConfig

DATA = os.environ.get("PEER_NB_DATA")


# ---- rules of answers ----------------------------------------------------------------------------------------------------

def test_words_are_those_of_squads_script():
    "As lm-eval has it for Qasper, on texts that are hard to take apart"
    theirs = pytest.importorskip("lm_eval.tasks.qasper.metrics")
    draw = random.Random(0)
    pieces = ["The", "a", "an", "theory", "U.S.", "co-operate", "Gordon", "Brown", "(2008)", "it's", "10%", "é", "—", "\t", "An", "brown,", "yes", "no"]
    texts = [" ".join(draw.choices(pieces, k=draw.randrange(9))) for _ in range(400)]
    for said, right in zip(texts, reversed(texts)):
        assert " ".join(normal_words(said)) == theirs.normalize_answer(said)
        if {" ".join(normal_words(said)), " ".join(normal_words(right))} & {"yes", "no", "noanswer"}: continue
        assert words_f1(said, right) == pytest.approx(theirs.f1_abstractive([said], [right]))


@pytest.mark.parametrize("said, right, f1", [   # of the rule of HotpotQA's script: P and R in words, by hand
    ("Gordon Brown", "gordon brown!", 1.0), ("the Prime Minister Gordon Brown", "Gordon Brown", 2*(2/4)*1/(2/4 + 1)), ("Yes", "yes.", 1.0),
    ("yes, both are", "yes", 0.0), ("no", "noanswer", 0.0), ("", "no", 0.0), ("brown brown", "brown", 2*.5*1/1.5)])
def test_f1_of_hotpotqa(said, right, f1): assert words_f1(said, right) == pytest.approx(f1)


def test_numbers_are_those_of_lm_eval():
    "Its two filters of GSM8K, and its clean-up"
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    strict, loose = extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)", fallback=""), extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1, fallback="")
    texts = ["so #### 1,200", "he pays $18", "5 and 7", "It is -3.", "a total of $1,234.", "#### -5\nQuestion: 9", "nothing", "7", "about 0.5 of 12", "x = 3,000,000"]
    for text, a, b in zip(texts, strict.apply([[t] for t in texts], texts), loose.apply([[t] for t in texts], texts)):
        theirs = (a[0] or b[0]).replace(",", "").replace("$", "").rstrip(".")
        assert str(read_number(text) if read_number(text) is not None else "") == theirs, text


@pytest.mark.skipif(not DATA, reason="PEER_NB_DATA names no folder of benchmark items")
def test_numbers_of_all_items_of_gsm8k():
    rows = [json.loads(line) for line in (Path(DATA)/"gsm8k"/"train.jsonl").read_text().splitlines()]
    assert len(rows) == 7473
    for row in rows:
        gold = row["answer"].rpartition("#### ")[2]
        assert grade("number", row["answer"], gold).em
        assert not grade("number", row["answer"] + "1", gold).em


def test_an_answer_that_cannot_be_read_is_invalid():
    assert [grade("number", "no idea", "5").invalid, grade("words", "The.", "x").invalid, grade("exact", " ", "x").invalid] == [True]*3
    assert trimmed("What? 7\nQuestion: 8", ["Question:"], "What?") == "7"
    with pytest.raises(UserError, match="holds no number"): grade("number", "5", "five")


# ---- bytes of caches -----------------------------------------------------------------------------------------------------

SIZES = dict(vocab_size=40, hidden_size=32, num_hidden_layers=3, intermediate_size=16, num_attention_heads=4)
LATENT = dict(q_lora_rank=16, kv_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6)
ENDS = dict(bos_token_id=0, eos_token_id=1)
CONFIGS = {
    "mha": (hf.LlamaConfig(**SIZES), "MHA"), "gqa": (hf.LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=16), "GQA"), "mqa": (hf.MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=None), "MQA"),
    "window": (hf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8), "GQA"), "some windows": (hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=8), "GQA"),
    "no window in use": (hf.Qwen2Config(**SIZES, num_key_value_heads=2, use_sliding_window=False), "GQA"),
    "gpt2": (hf.GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, **ENDS), "MHA"), "one head": (hf.GPTBigCodeConfig(vocab_size=40, n_embd=32, n_layer=3, n_head=4, multi_query=True, **ENDS), "MQA"),
    "opt": (hf.OPTConfig(vocab_size=40, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=16, word_embed_proj_dim=32, max_position_embeddings=64), "MHA"),
    "deepseek": (hf.DeepseekV3Config(**SIZES, num_key_value_heads=4, first_k_dense_replace=3, **LATENT), "MLA"), "ours": (PeerMLAConfig(**SIZES, use_peer=False, mla_config=LATENT), "MLA"),
    "ours, grouped": (PeerMLAConfig(**SIZES, use_peer=False, attention_kind="gqa", num_key_value_heads=2), "GQA"), "ours, one": (PeerMLAConfig(**SIZES, use_peer=False, attention_kind="mqa"), "MQA")}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_weighs_what_its_configuration_says(name, dtype):
    config, kind = CONFIGS[name]
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for tokens in (3, 20):
        with torch.no_grad(): cache = model(input_ids=torch.full((2, tokens), 5), use_cache=True).past_key_values
        assert cache_bytes(config, tokens, dtype.itemsize, rows=2) == real_cache_bytes(cache)
    assert cache_kind(config) == kind


def test_mistral_and_llama_take_an_eighth_of_a_mebibyte_a_token():
    mistral = hf.MistralConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=None)
    assert cache_bytes(mistral, 118, 2) == 14.75*2**20   # and not 59 MB
    assert saved_text(100, 43) == "saves 57 %" and saved_text(43, 100) == "costs 133 % more" and saved_text(5, 5) == "saves nothing"


# ---- answers from vectors ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["gqa", "gpt2", "opt", "ours"])
def test_padded_vectors_go_on_as_words_alone_do(name):
    "transformers' own generation from token ids, one row at a time"
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name][0]).eval()
    model.generation_config.temperature = .6   # a model's own taste is left out
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
    found = continued(model, *embedded(model, prompts), new_tokens=5)
    for prompt, tokens in zip(prompts, found.tokens):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
        assert tokens == alone[:len(tokens)] and (len(tokens) == 5 or tokens[-1] == model.config.eos_token_id)
    assert found.in_tokens == [3, 6, 1] and 0 < found.first <= found.seconds
    one = continued(model, *embedded(model, prompts[:1]), new_tokens=5)
    assert real_cache_bytes(one.cache) == cache_bytes(model.config, 3 + len(one.tokens[0]) - 1, 4)


def test_soft_tokens_of_few_bits():
    "Against torch's own quantisation on the same grid"
    soft = torch.randn(4, 64)
    for row, got in zip(soft, quantised(soft, 8)):
        step = (row.abs().max()/127).half().float().item()
        assert torch.allclose(torch.fake_quantize_per_tensor_affine(row, step, 0, -127, 127), got, atol=1e-6)
    errors = [(quantised(soft, bits) - soft).abs().mean() for bits in (8, 4, 2)]
    assert errors == sorted(errors) and soft_bytes(64, 48, 4) == 64*24 + 128 and soft_bytes(64, 48, 16) == 64*96


# ---- arms, on two models that nobody has trained -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bridge(tmp_path_factory):
    "Two tiny models and a translator whose gates are open"
    place = write_ends(tmp_path_factory.mktemp("models"))
    cfg = config_from_dict(dict(train_config=dict(max_steps=1), bridge_config=dict(source=dict(model=str(place/"source")), target=dict(model=str(place/"target")),
                           translator=dict(soft_tokens=4, bottleneck=16, heads=2), evaluate=dict(max_new_tokens=3, stop=[";"]))))
    made = Bridge.new(cfg)
    with torch.no_grad():
        for block in made.translator.blocks: block.gates.fill_(1.)
    return made


@pytest.fixture(scope="module")
def items(bridge): return needle_items(bridge.options, "test", 6)


def asking(**more): return Asking(**dict(seed=3, config_hash="abc") | more)


def test_every_arm_counts_its_caches(bridge, items):
    "Against the tensors of the caches themselves, one item at a time"
    widths = dict(source=bridge.source.config, target=bridge.target.config)
    for arm in possible_arms(items):
        reply = ARMS[arm](bridge, items[:1], items[1:2])
        line, = answer_lines(bridge, arm, items[:1], reply, asking())
        who = "source" if arm == "source_alone" else "target"
        assert line[f"kv_mb_{who}"]*1e6 == real_cache_bytes(reply.found.cache)
        prompt = len(bridge.source_tokenizer(items[0].source_prompt)["input_ids"])
        read = cache_bytes(widths["source"], prompt, 4)/1e6
        if reply.soft: assert line["kv_mb_source"] == read and line["soft_len"] == 4
        elif arm == "cascade": assert line["kv_mb_source"] >= read
        elif arm != "source_alone": assert line["kv_mb_source"] == 0
        assert 0 < line["ttft_s"] <= line["latency_s"] and line["out_len"] <= 3
        if arm.startswith("budget"): assert line["in_len"] == 4
        validate(line, SAMPLE_SCHEMA)


def test_arms_read_what_they_say(bridge, items, monkeypatch):
    "What goes into the model, against embeddings that are put together here"
    seen = {}
    def spy(model, embeds, mask, *rest):
        seen["rows"] = [row[keep.bool()] for row, keep in zip(embeds, mask)]
        return continued(model, embeds, mask, *rest)
    monkeypatch.setattr("peer_nb.bridge.arms.continued", spy)
    table, soft = bridge.target.get_input_embeddings().weight, bridge.soft_tokens(items)
    words = lambda text: table[bridge.target_tokenizer(text)["input_ids"]]
    other, zero = soft.roll(-1, 0), bridge.translator(torch.zeros(1, 5, 32), torch.ones(1, 5, dtype=torch.bool))[0]
    last, instruction = items[-1], words("=")
    expected = dict(target_alone=words(last.target_prompt), budget_first=words(last.target_prompt)[:4], budget_last=words(last.target_prompt)[-4:], oracle=words(last.oracle),
                    latent=torch.cat([soft[-1], instruction]), latent_with_text=torch.cat([soft[-1], words(last.target_prompt)]), shuffled_source=torch.cat([other[-1], instruction]),
                    zero_source=torch.cat([zero, instruction]), latent_8bit=torch.cat([quantised(soft, 8)[-1], instruction]))
    for arm, rows in expected.items():
        ARMS[arm](bridge, items, partners(items))
        assert torch.allclose(seen["rows"][-1], rows, atol=1e-5), arm
    reply = ARMS["cascade"](bridge, items, partners(items))
    said = ARMS["source_alone"](bridge, items, partners(items)).texts[-1].strip()
    ARMS["cascade"](bridge, items, partners(items))
    assert torch.equal(seen["rows"][-1], words(last.cascade.format(text=said))) and reply.before > 0


def test_frozen_models_stay_as_they_are(bridge, items):
    before = [p.clone() for model in (bridge.source, bridge.target) for p in model.parameters()]
    for arm in possible_arms(items): ARMS[arm](bridge, items, partners(items))
    after = [p for model in (bridge.source, bridge.target) for p in model.parameters()]
    assert all(a.equal(b) for a, b in zip(before, after))


def test_an_evaluation_goes_on_where_it_was_killed(bridge, items, tmp_path, monkeypatch):
    "The same answers, none of them twice, and none anew"
    arms, splits = ["target_alone", "latent", "zero_source"], dict(test=items)
    plain = [{k: v for k, v in line.items() if k in ("arm", "id", "pred", "em", "in_len")} for line in
             ask_arms(bridge, splits, tmp_path/"whole", asking(), dict(weights="w"), arms, batch=2, say=lambda line: None)]
    assert [line["arm"] for line in plain[::2]] == [arm for order in turns(arms, 3) for arm in order]   # they take turns
    ask_arms(bridge, splits, tmp_path/"cut", asking(), dict(weights="w"), arms, batch=2, say=lambda line: None)
    file = tmp_path/"cut"/"samples.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(True)[:7]) + b'{"arm": "lat')   # torn in the middle of a batch
    asked = []
    real = ARMS["latent"]
    monkeypatch.setitem(ARMS, "latent", lambda b, some, others: asked.append([i.id for i in some]) or real(b, some, others))
    again = ask_arms(bridge, splits, tmp_path/"cut", asking(), dict(weights="w"), arms, batch=2, say=lambda line: None)
    key = lambda line: (line["arm"], line["id"])
    assert sorted(map(key, again)) == sorted(map(key, plain)) and len({*map(key, again)}) == len(again)
    short = {key(l): (l["pred"], l["em"], l["in_len"]) for l in again}
    assert short == {key(l): (l["pred"], l["em"], l["in_len"]) for l in plain}
    assert asked[0] == [items[0].id, items[1].id] and sum(map(len, asked[1:])) == 6 - sum(key(l)[0] == "latent" for l in again[:7])
    with pytest.raises(UserError, match="weights .w there, other now"):
        ask_arms(bridge, splits, tmp_path/"cut", asking(), dict(weights="other"), arms, batch=2)


def test_bad_arms_are_refused(bridge, items):
    with pytest.raises(UserError, match="item test-0: the data do not say"): ARMS["oracle"](bridge, [replace(items[0], oracle="")], items[1:2])
    with pytest.raises(UserError, match="unknown; known: source_alone"): possible_arms(items, ["latnt"])
    with pytest.raises(UserError, match="one item alone"): partners(items[:1])


# ---- the command, on a run of three steps ------------------------------------------------------------------------------

def few_steps(place: Path, out: Path, *more: str):
    "A run between the two tiny models"
    train = dict(output_dir=str(out), max_steps=3, eval_steps=3, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-2)
    bridge = dict(source=dict(model=str(place/"source")), target=dict(model=str(place/"target")), translator=dict(soft_tokens=4, depth=1, bottleneck=16, heads=2),
                  data=dict(train_items=16, validation_items=2, test_items=2), evaluate=dict(max_new_tokens=3))
    return apply_overrides(config_from_dict(dict(train_config=train, bridge_config=bridge)), [*more])


def test_answers_one_at_a_time_are_those_of_a_batch(tmp_path, capsys):
    "--inference asks what evaluate asks, with a batch of one and files of its own"
    run = train_bridge(few_steps(write_ends(tmp_path), tmp_path/"run"), progress=False).folder
    assert main(["evaluate", str(run)]) == 0
    assert main(["evaluate", str(run), "--inference"]) == 0
    out = capsys.readouterr().out
    many, single = (sorted(read_jsonl(run/name/"samples.jsonl"), key=lambda l: (l["arm"], l["split"], l["id"])) for name in ("evaluation", "inference"))
    plain = lambda lines: [{k: l[k] for k in ("arm", "split", "id", "pred", "em", "in_len", "out_len", "kv_mb_target", "kv_mb_source")} for l in lines]
    assert plain(many) == plain(single) and len(single) == 12*4
    assert {l["batch"] for l in single} == {1} and {l["batch"] for l in many} == {2}
    for line in single: validate(line, SAMPLE_SCHEMA)
    assert out.count("shuffled_source") == 4 and str(run/"inference"/"index.html") in out
    assert "inference" in (run/"inference"/"index.html").read_text() and "undefined" in out   # compression of latent_with_text


def test_a_swapped_pair_is_the_pair_given_the_other_way_round(tmp_path):
    "The same weights to the bit, and the same answers of every arm; neither model has changed"
    ends, swap = write_ends(tmp_path), "bridge_config.swap=true"
    by_hand = [f"bridge_config.{a}.model={ends/b}" for a, b in (("source", "target"), ("target", "source"))]
    files = {name: (ends/name/"model.safetensors").read_bytes() for name in ("source", "target")}
    runs = [train_bridge(few_steps(ends, tmp_path/name, *words), progress=False) for name, words in (("swapped", [swap]), ("by hand", by_hand), ("straight", []))]
    swapped, hand, straight = (run.bridge for run in runs)
    assert type(swapped.source) is hf.LlamaForCausalLM and type(swapped.target) is hf.MistralForCausalLM
    for one, two in zip(swapped.translator.state_dict().values(), hand.translator.state_dict().values(), strict=True): assert one.equal(two)
    for name, model in (("source", swapped.target), ("target", swapped.source)):
        kept = hf.AutoModelForCausalLM.from_pretrained(ends/name).state_dict()
        assert all(value.equal(kept[key]) for key, value in model.state_dict().items())
    assert swapped.translator.config.target_width == 32 and straight.translator.config.target_width == 24
    said = []
    for run in runs[:2]:
        assert main(["evaluate", str(run.folder)]) == 0
        said.append([(l["arm"], l["id"], l["pred"], l["kv_mb_source"], l["kv_mb_target"]) for l in read_jsonl(run.folder/"evaluation"/"samples.jsonl")])
    assert said[0] == said[1] and ", swapped" in (runs[0].folder/"evaluation"/"index.html").read_text()


# ---- no input holds its own answer ---------------------------------------------------------------------------------------

def word_problems(folder: Path, leak: str = "") -> Path:
    "Sixty problems in the format of GSM8K; the question of number 41 ends in what leaks"
    for n in range(60):
        answer = f"Ann has {n} + 2 = <<{n}+2={n + 2}>>{n + 2} eggs.\n#### {n + 2}"
        append_jsonl(folder/"train.jsonl", dict(question=f"Ann has {n} eggs and buys 2. How many?" + leak.format(answer=answer, gold=n + 2)*(n == 41), answer=answer))
    return folder


def questions(folder: Path, leak: str = "") -> Path:
    "Sixty questions in the format of HotpotQA; a paragraph of number 41 ends in what leaks"
    rows = [dict(_id=f"5a{n}", question=f"Where was town {n}'s mayor born?", answer=f"Port {n}", type="bridge", level="easy", supporting_facts=[["Mayor", 0]],
                 context=[["Town", [f"Town {n} has a mayor.", " It is old."]], ["Mayor", [f"The mayor of town {n} was born in Port {n}." + leak.format(answer=f"Port {n}")*(n == 41)]]]) for n in range(60)]
    (folder/"hotpot_train_v1.1.json").write_text(json.dumps(rows))
    return folder


LEAKS = {"the whole solution": (word_problems, "gsm8k", "train-41", " {answer}"), "its last line": (word_problems, "gsm8k", "train-41", " (#### {gold})"),
         "an answer that is announced": (questions, "hotpotqa", "5a41", " Answer: {answer}")}


@pytest.mark.parametrize("make, task, id, leak", LEAKS.values(), ids=LEAKS.keys())
def test_an_input_that_holds_its_answer_is_refused_by_its_id(tmp_path, capsys, make, task, id, leak):
    "In training and by the id of the item; the same file without the leak is read whole"
    (tmp_path/"clean").mkdir()
    (tmp_path/"leaking").mkdir()
    words = [f"bridge_config.data.task={task}", "bridge_config.data.train_items=100", "bridge_config.{end}.prompt='{{context}} {{question}}'"]
    words = [*words[:2], *(words[2].format(end=end) for end in ("source", "target"))]
    ends = write_ends(tmp_path)
    clean = few_steps(ends, tmp_path/"run", *words, f"bridge_config.data.path={make(tmp_path/'clean')}")
    clean.bridge_config.data.validation_items = clean.bridge_config.data.test_items = 100
    assert sum(map(len, load_items(clean.bridge_config).values())) == 60
    leaking = few_steps(ends, tmp_path/"run", *words, f"bridge_config.data.path={make(tmp_path/'leaking', leak)}")
    leaking.bridge_config.data.validation_items = leaking.bridge_config.data.test_items = 100
    file = save_config(leaking, tmp_path/"bridge.yaml")
    capsys.readouterr()   # what was said while the models were written
    assert main(["train", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"item {id}: its source_prompt contains its own gold answer" in err and err.count("\n") == 1
    assert not (tmp_path/"run").exists()
