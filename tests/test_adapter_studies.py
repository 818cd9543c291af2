"The three studies of adapters: how their numbers are read, and that their files are what their pages say."
import math
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st
from test_pretrained import bases   # noqa: F401 (fixture)

from peer_nb.config import apply_overrides, load_config
from peer_nb.findings.adapter_capacity import Memorized, capacity, needed_rank, stored_bits
from peer_nb.findings.adapter_places import cross_fitted
from peer_nb.findings.forgetting import at_equal
from peer_nb.lora_targets import equal_ranks
from peer_nb.schema import TrainConfig
from peer_nb.study.study import load_study
from peer_nb.training.bases import BASES, cached_base

STUDIES = Path(__file__).parents[1]/"configs"/"adapters"


def opt_tensors(**sizes):
    from transformers import OPTConfig, OPTForCausalLM
    return {name: tuple(p.shape) for name, p in OPTForCausalLM(OPTConfig(**sizes)).named_parameters()}


def test_stored_bits_are_the_entropy_that_is_left_away():
    "Against scipy: uniform over all values, then over the tenth that begins with the right digits"
    from scipy.special import entr
    full, left = (entr(np.full(count, 1/count)).sum()/np.log(2) for count in (900_000, 90_000))
    assert stored_bits(7, -math.log(90_000)) == pytest.approx(7*(full - left), rel=1e-9)
    assert stored_bits(7, -20.0) < 0 < stored_bits(7, 0.0)


@given(bits=st.floats(0.1, 6), noise=st.floats(0.01, 0.1))
@settings(max_examples=30, deadline=None)
def test_the_capacity_of_a_learner_that_is_known_is_found(bits, noise):
    "By scipy's interval; a table that fits, and one that is too much, change nothing"
    from scipy.special import stdtrit
    each = [bits*(1 + noise*(seed - 1)) for seed in (0, 1, 2)]
    def runs(facts, held): return [Memorized(facts, 4, seed, 400, 0.0, min(held[seed], stored_bits(facts, 0))) for seed in (0, 1, 2)]
    found = capacity([*runs(1, [1e9]*3), *runs(10_000, [400*b for b in each]), *runs(20_000, [1.0, 2.0, 3.0])])
    table, c = found[4]
    half = stdtrit(2, 0.975)*np.std(each, ddof=1)/np.sqrt(3)
    assert table == 10_000 and [c.mean, c.low, c.high] == pytest.approx([bits, bits - half, bits + half]) and list(found) == [4]
    assert capacity([]) == {}


def test_the_least_rank_that_was_enough():
    def run(facts, rank, seed, known): return Memorized(facts, rank, seed, rank, known, 0.0)
    runs = [run(64, 16, 1, 1.0), run(64, 1, 1, 0.95), run(64, 1, 2, 0.2), run(64, 4, 2, 0.89), run(64, 16, 2, 0.9), run(8, 1, 1, 0.0)]
    assert needed_rank(runs) == {8: {1: None}, 64: {1: 1, 2: 16}}


@given(st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=1, max_size=4), st.sampled_from([1, -1]))
@settings(max_examples=50, deadline=None)
def test_a_rate_is_chosen_by_the_other_seeds(table, sign):
    "Against numpy; and what a seed scored has no say in its own rate"
    scores = {rate: dict(enumerate(own)) for rate, own in enumerate(table)}
    found, array = cross_fitted(scores, sign), np.array(table)
    for seed, (rate, value) in found.items():
        others = np.delete(sign*array, seed, axis=1).sum(1)
        assert value == array[rate, seed] and others[rate] == pytest.approx(others.max())
        changed = {r: own | {seed: 99.0*r} for r, own in scores.items()}
        assert cross_fitted(changed, sign)[seed][0] == rate
    assert cross_fitted({"one": {1: 2.0}}) == {} == cross_fitted({})


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_a_run_is_read_where_it_knows_as_much(steps, part):
    "Against numpy's interpolation, on curves that rise; and at the first crossing of those that fall back"
    new = np.cumsum(steps) - 10
    old = -np.sqrt(np.arange(len(new)) + 1.0)
    level = new[0] + part*(new[-1] - new[0])
    assert at_equal(zip(new, old), level) == pytest.approx(np.interp(level, new, old), abs=1e-6)
    assert at_equal(zip(new, old), new[-1] + 1) is None
    again = [*zip(new, old), (new[0], -50.0), (new[-1] + 1, -99.0)]
    assert at_equal(again, level) == pytest.approx(np.interp(level, new, old), abs=1e-6)


def test_equal_ranks_are_equal_where_they_can_be():
    "OPT with a feed-forward layer four times as wide: 45, 36 and 20 are the least that agree, by trying all"
    tensors = opt_tensors(vocab_size=16, hidden_size=64, ffn_dim=256, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=64, max_position_embeddings=16)
    sets = dict(attention=["attn"], feed_forward=["mlp"], both=["all"])
    per_rank = np.array([4*128, 2*320, 4*128 + 2*320])
    least = next(n for n in range(1, 10**6) if not (n % per_rank).any())
    found = equal_ranks(sets, "opt", tensors, least)
    assert [rank for rank, _ in found.values()] == [45, 36, 20] and {count for _, count in found.values()} == {least}
    near = equal_ranks(sets, "opt", tensors, 5000)
    assert all(abs(count - 5000) <= size/2 for (_, count), size in zip(near.values(), per_rank))


def test_every_set_of_the_study_trains_as_many_parameters_by_pefts_count():
    from peft import LoraConfig, get_peft_model
    from transformers import OPTConfig, OPTForCausalLM
    names = dict(all=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], attn=["q_proj", "k_proj", "v_proj", "out_proj"], mlp=["fc1", "fc2"])
    counts = []
    for level in yaml.safe_load((STUDIES/"where.yaml").read_text())["axes"]["adapters"].values():
        model = OPTForCausalLM(OPTConfig(**BASES["digits:opt"].sizes))
        adapted = get_peft_model(model, LoraConfig(r=level["lora_config.rank"], target_modules=names[level["lora_config.target_modules"][0]]))
        counts.append(adapted.get_nb_trainable_parameters()[0])
    assert counts == [4096]*3


@pytest.mark.parametrize("name", ["capacity", "where", "forgetting"])
def test_every_run_reads_each_fact_forty_times(name):
    "15 tokens a pair: six digits, a colon, six digits, a blank, the end"
    study = load_study(STUDIES/f"{name}.yaml")
    base = load_config(study.base_config)
    assert len(study.seeds) >= 3
    for axis, levels in study.axes.items():
        for level in levels.values():
            cfg = apply_overrides(base, level)
            arguments = cfg.dataset_config.datasets[0].task_arguments
            pairs = (yaml.safe_load(arguments) if isinstance(arguments, str) else arguments)["num_pairs"]
            assert cfg.train_config.max_tokens == 40*15*pairs, (axis, level)


def test_a_study_may_begin_with_a_base_that_is_made_on_the_spot(bases, tmp_path, monkeypatch):
    "It is made once, then found; a study's own configuration holds the folder"
    import shutil
    from peer_nb.running.command import read_request
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path/"cache"))
    made = []
    def child(code):
        made.append(code)
        shutil.copytree(bases["opt"], cached_base("digits:opt"))
        class Done:
            def wait(self): return 0
        return Done()
    monkeypatch.setattr("peer_nb.training.bases.start_child", child)
    for _ in range(2):
        request = read_request(None, STUDIES/"where.yaml", None, None, None, None, [])
        assert request.base.model_config.pretrained == request.base.dataset_config.tokenizer_name == str(cached_base("digits:opt"))
    assert len(made) == 1 and "digits:opt" in made[0]


@pytest.mark.parametrize("name", BASES)
def test_a_base_is_made_anew_by_what_decides_it_alone(name, monkeypatch):
    "Every number of the training stands in the recipe, so that no default of the schema decides; each changes the folder"
    from peer_nb.training import bases
    base, told = BASES[name], bases.DECIDING | BASES[name].train
    trained = bases.recipe(base, Path("out"), Path("start")).train_config
    silent = {f.name for f in fields(TrainConfig) if isinstance(getattr(trained, f.name), float)} - {*told} - {"table_weight_decay"}   # it has no table
    assert not silent and {"seed", "lr_scheduler_type", "per_device_train_batch_size", "gradient_accumulation_steps"} <= {*told}
    monkeypatch.setattr(bases, "data_fingerprint", lambda cfg: "of the text")
    folder = cached_base(name)
    monkeypatch.setitem(bases.BOOKKEEPING, "save_steps", 7)
    later = make_dataclass("Later", [("new_key", int, field(default=1))], bases=(TrainConfig,))
    monkeypatch.setattr(bases, "recipe", lambda *given, made=bases.recipe: (cfg := made(*given), setattr(cfg, "train_config", later(**vars(cfg.train_config))))[0])
    assert cached_base(name) == folder
    for part, key in [("sizes", "hidden_size"), ("train", "per_device_train_batch_size"), ("data", "max_seq_length")]:
        monkeypatch.setitem(BASES, name, replace(base, **{part: getattr(base, part) | {key: 24}}))
        assert cached_base(name) != folder, key
        monkeypatch.setitem(BASES, name, base)
    for key in bases.DECIDING:
        with monkeypatch.context() as changed:
            changed.setitem(bases.DECIDING, key, "linear" if key == "lr_scheduler_type" else 2 if isinstance(bases.DECIDING[key], int) else 0.5)
            assert cached_base(name) != folder or key in base.train, key


def test_another_model_comes_with_its_own_tokenizer(tmp_path):
    (tmp_path/"run.yaml").write_text("model_config: {pretrained: first}")
    changed = load_config(tmp_path/"run.yaml", ["model_config.pretrained=second"])
    assert changed.dataset_config.tokenizer_name == "second"
    assert apply_overrides(changed, {"dataset_config.tokenizer_name": "bytes", "model_config.pretrained": "third"}).dataset_config.tokenizer_name == "bytes"


def test_a_plain_run_may_begin_with_such_a_base(tmp_path, monkeypatch):
    from peer_nb.running import train
    monkeypatch.setattr(train, "base_folder", lambda name: f"made/{name}")
    (tmp_path/"run.yaml").write_text("model_config: {pretrained: digits:opt}")
    words = ["--config", str(tmp_path/"run.yaml"), "--resume"]
    made = [*words, "model_config.pretrained=made/digits:opt"]
    assert train.with_base(words) == made and train.with_base([f"--config={words[1]}"])[-1] == made[-1]
    assert train.with_base([*words, "model_config.pretrained=a"]) == [*words, "model_config.pretrained=a"]
    assert train.with_base(["model_config.pretrained=python:opt"]) == ["model_config.pretrained=made/python:opt"]
    assert train.with_base(["--merge", "a", "b"]) == ["--merge", "a", "b"]


def test_a_level_that_looks_like_a_number_is_found_again(tmp_path):
    "The study's own copy of its file, whose claims are compared with the plan's"
    from peer_nb.config import read_yaml, yaml_text
    study = read_yaml(STUDIES/"where.yaml")
    (tmp_path/"study.yaml").write_text(yaml_text(study))
    again = load_study(tmp_path/"study.yaml")
    assert again.claims == load_study(STUDIES/"where.yaml").claims and again.claims[0]["a"]["learning_rate"] == "1e-2"
