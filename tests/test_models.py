"Heavier checks of the models: random shapes, invariants across modules, configuration in step with the package"
import copy
import re
import subprocess
import sys
from dataclasses import fields
from math import prod
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import DynamicCache, StaticCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from peer_nb import config
from peer_nb.models import options
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.models.mla import LatentAttention, rotary_angles
from peer_nb.models.peer import ACTIVATIONS, MEMORY_KINDS, PEER, TABLE_DTYPES, TABLE_GRADIENTS
from peer_nb.models.product_keys import brute_force_top_k, product_top_k, staircase

torch.set_num_threads(1)
MLA = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8)
MEMORY = dict(num_experts=64, num_experts_per_tok=4, num_heads=2, product_key_dim=[8, 8], query_dim=16, query_norm="batch")
TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=97, max_position_embeddings=64,
            peer_start_layer=1, peer_config=MEMORY, mla_config=MLA)


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return PeerMLAForCausalLM(PeerMLAConfig(**TINY | changes)).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 97, (2, 13), generator=torch.Generator().manual_seed(3))


# configuration

CHOICES = {"memory_kind": (options.ModelConfig, [*MEMORY_KINDS, "moe", "ultramem"]),   # a mixture of experts is a feed-forward and no memory layer
           "activation": (options.PeerConfig, ACTIVATIONS),
           "table_gradient": (options.PeerConfig, TABLE_GRADIENTS), "table_dtype": (options.PeerConfig, TABLE_DTYPES)}


@pytest.mark.parametrize("key", CHOICES)
def test_what_may_be_chosen_is_what_there_is(key):
    section, known = CHOICES[key]
    assert set(get_args(get_type_hints(section)[key])) == set(known)


@pytest.mark.parametrize("wrong,said", [
    (dict(hidden_size=0), "hidden_size=0 is not allowed; allowed: a whole number, at least 1"),
    (dict(dropout=1.0), "dropout=1.0 is not allowed; allowed: a number from 0 to below 1"),
    (dict(memory_kind="expert"), "memory_kind='expert' is not allowed; allowed: peer | pkm | memory_plus | moe | ultramem"),
    (dict(peer_config=MEMORY | dict(num_heads=0)), "peer_config.num_heads=0 is not allowed"),
    (dict(mla_config=MLA | dict(qk_rope_head_dim=7)), "mla_config.qk_rope_head_dim=7 is not allowed; allowed: an even number"),
    (dict(mla_config=MLA | dict(rope_scaling=dict(rope_type="longer", factor=2., original_max_position_embeddings=16))), "mla_config.rope_scaling.rope_type='longer'"),
    (dict(loss_chunk_size=True), "loss_chunk_size=True is not allowed; allowed: a whole number, at least 1 | null")])
def test_a_model_refuses_what_its_keys_cannot_take(wrong, said):
    "Whether it is built by hand or its configuration is changed afterwards"
    with pytest.raises(ValueError, match=re.escape(said)): PeerMLAConfig(**TINY | wrong)
    config = PeerMLAConfig(**TINY)
    for key, value in wrong.items(): setattr(config, key, {**getattr(config, key), **value} if isinstance(value, dict) else value)
    with pytest.raises(ValueError, match=re.escape(said)): PeerMLAForCausalLM(config)


def test_model_config_fields_and_defaults_are_the_packages():
    package, model = config.ModelConfig(), PeerMLAConfig()
    for f in fields(config.ModelConfig):
        want, got = getattr(package, f.name), vars(model)[f.name]
        assert got == (vars(want) if f.name in ("peer_config", "mla_config", "moe_config", "engram_config") else want), f.name


def test_models_import_only_what_they_may():
    code = ("import sys, peer_nb.models.causal_lm; own = [m for m in sys.modules if m.startswith('peer_nb')]; "
            "assert set(own) <= {'peer_nb', 'peer_nb.models'} | {'peer_nb.models.'+m for m in ('options', 'mla', 'heads', 'product_keys', 'peer', 'moe', 'ultramem', 'engram', 'causal_lm', 'kernels', 'kernels.ops')}, own")
    subprocess.run([sys.executable, "-c", code], check=True)


# retrieval

@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 24), min_size=1, max_size=4), k=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_top_k_is_exact_for_any_sizes(sizes, k, seed):
    k = min(k, prod(sizes))
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randn(4, n, generator=g, dtype=torch.float64) for n in sizes]
    (got, index), (want, want_index) = product_top_k(scores, k), brute_force_top_k(scores, k)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert torch.equal(index, want_index)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=3), k=st.integers(1, 16), levels=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_top_k_under_ties(sizes, k, levels, seed):
    k = min(k, prod(sizes))
    g = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, levels, (6, n), generator=g).double() for n in sizes]
    got, index = product_top_k(scores, k)
    assert torch.equal(got, brute_force_top_k(scores, k)[0])
    total = scores[0]
    for s in scores[1:]: total = (total[..., :, None] + s[..., None, :]).flatten(-2)
    assert torch.equal(total.gather(-1, index), got)
    assert all(len(set(row)) == k for row in index.tolist())


@pytest.mark.parametrize("sizes", [[32, 32], [8, 16, 8], [4, 256], [2, 512], [4, 4, 4, 4], [3, 5, 7], [64, 3]])
@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_float32_retrieval_finds_the_float64_best(sizes, k):
    scores = [torch.randn(64, n, generator=torch.Generator().manual_seed(k)) for n in sizes]
    got, _ = product_top_k(scores, k)
    want, _ = brute_force_top_k([s.double() for s in scores], k)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)


def test_every_expert_can_be_hit():
    "A one-hot query over one-hot keys retrieves exactly the row that it spells, for all rows"
    sizes = [3, 5, 7]
    rows = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    scores = [torch.nn.functional.one_hot(rows[:, d], n).double() for d, n in enumerate(sizes)]
    assert torch.equal(product_top_k(scores, 1)[1][:, 0], torch.arange(prod(sizes)))


@given(rows=st.integers(1, 40), cols=st.integers(1, 40), k=st.integers(1, 40))
def test_staircase_keeps_enough_and_no_more(rows, cols, k):
    pairs = set(zip(*staircase(rows, cols, k)))
    assert len(pairs) >= min(k, rows*cols)
    assert pairs == {(i, j) for i in range(rows) for j in range(cols) if (i+1)*(j+1) <= k}


# memory layers

@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_bfloat16_stays_near_float32(kind):
    torch.manual_seed(0)
    layer = MEMORY_KINDS[kind](32, **options.PeerConfig(**MEMORY | dict(query_norm="none")).layer_arguments()).eval()
    x = torch.randn(20, 32).bfloat16()
    narrow = copy.deepcopy(layer).bfloat16()
    wide = copy.deepcopy(narrow).float()
    want, got = wide(x.float()), narrow(x)
    same = (wide.route(x.float())[1].sort(-1)[0] == narrow.route(x)[1].sort(-1)[0]).flatten(1).all(1)  # rounding may choose other rows
    assert got.dtype == torch.bfloat16 and same.float().mean() > .5
    assert (got.float() - want)[same].abs().max() < .05 * want.abs().max()


def test_an_expert_that_is_retrieved_twice_learns_from_both():
    torch.manual_seed(0)
    layer = PEER(8, num_experts=4, num_experts_per_tok=2, num_heads=2, product_key_dim=[2, 2], query_dim=4, query_norm="none").double()
    with torch.no_grad():
        layer.keys[1] = layer.keys[0]
        layer.query_proj.weight[4:] = layer.query_proj.weight[:4]    # both heads retrieve the same experts
    single = PEER(8, num_experts=4, num_experts_per_tok=2, num_heads=1, product_key_dim=[2, 2], query_dim=4, query_norm="none").double()
    with torch.no_grad():
        single.keys.copy_(layer.keys[:1])
        single.query_proj.weight.copy_(layer.query_proj.weight[:4])
    for name in single.table_names: getattr(single, name).load_state_dict(getattr(layer, name).state_dict())
    x = torch.randn(5, 8).double()
    out, one = layer(x), single(x)
    torch.testing.assert_close(out, 2*one)
    g = torch.randn_like(out)
    (out*g).sum().backward()
    (one*g).sum().backward()
    for name in single.table_names: torch.testing.assert_close(getattr(layer, name).weight.grad, 2*getattr(single, name).weight.grad)


# attention

@pytest.mark.parametrize("q_lora_rank", [None, 48])
@pytest.mark.parametrize("heads,rank,nope,rope,v,theta", [(2, 24, 16, 8, 12, 1e4), (6, 32, 8, 16, 8, 5e5), (1, 8, 4, 2, 20, 1e3)])
def test_attention_is_deepseeks(q_lora_rank, heads, rank, nope, rope, v, theta):
    cfg = DeepseekV3Config(hidden_size=48, num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=rank, q_lora_rank=q_lora_rank,
                           qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v, rope_parameters=dict(rope_type="default", rope_theta=theta))
    torch.manual_seed(0)
    x, pos = torch.randn(2, 40, 48), torch.arange(3, 43)[None].expand(2, -1)
    allowed = torch.ones(40, 40).tril().bool().expand(2, 1, -1, -1).clone()
    allowed[1, :, :, :7] = False
    mask, real = torch.where(allowed, 0., torch.finfo(torch.float32).min), torch.ones(2, 40, 1)
    real[1, :7] = 0
    for implementation in ("eager", "sdpa"):
        cfg._attn_implementation = implementation
        theirs, ours = deepseek.DeepseekV3Attention(cfg, 0), LatentAttention(cfg)
        with torch.no_grad():
            for p in theirs.parameters():
                if p.ndim == 1: p.uniform_(.5, 1.5)    # norm weights other than 1, so that their place shows
        ours.load_state_dict(theirs.state_dict(), strict=True)
        want = theirs(x, deepseek.DeepseekV3RotaryEmbedding(cfg)(x, pos), mask)[0] * real
        got = ours(x, rotary_angles(pos, rope, theta), mask)[0] * real
        assert (got - want).abs().max() <= 2e-6


# the whole model

@pytest.mark.parametrize("changes", [{}, dict(mla_config=MLA | dict(q_lora_rank=20)), dict(memory_kind="memory_plus"), dict(share_memory=True), dict(use_peer=False)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoding_with_any_cache_is_the_whole_sequence(changes, implementation, ids):
    model = build(**changes)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        whole = model(ids).logits
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)):
            first = model(ids[:, :6], past_key_values=cache, use_cache=True).logits      # a prompt, a piece, then single tokens
            piece = model(ids[:, 6:8], past_key_values=cache, use_cache=True).logits
            rest = [model(ids[:, t:t+1], past_key_values=cache, use_cache=True).logits for t in range(8, 13)]
            assert (torch.cat([first, piece, *rest], 1) - whole).abs().max() <= 3e-6


def test_absorbed_decoding_honours_left_padding(ids):
    model, pad = build(), 4
    padded = torch.cat([torch.zeros(2, pad, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, pad), torch.ones(2, 13)], 1).long()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(padded[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
            last = model(padded[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True).logits
            assert (last - model(ids).logits[:, -1:]).abs().max() <= 2e-6


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(prompt_lookup_num_tokens=3), dict(cache_implementation="static")])
def test_generation_strategies(options, ids):
    model = build(initializer_range=.2)
    model.generation_config.pad_token_id = 0
    ids = ids[:1]
    common = dict(max_new_tokens=8, do_sample=False, num_beams=options.get("num_beams", 1))
    assert torch.equal(model.generate(ids, **common | options), model.generate(ids, use_cache=False, **common))


def test_evaluation_is_causal(ids):
    "A later token changes nothing before it, batch norm included"
    model = build().train()
    with torch.no_grad():
        model(ids)
        model.eval()
        other = ids.clone()
        other[:, 9:] = (other[:, 9:] + 1) % 97
        assert (model(ids).logits - model(other).logits)[:, :9].abs().max() <= 1e-6
        assert (model(ids).logits - model(other).logits)[:, 9:].abs().max() > 1e-3


def test_accumulated_batches_are_one_large_batch(ids):
    whole, parts = build(peer_config=MEMORY | dict(query_norm="layer")).train(), build(peer_config=MEMORY | dict(query_norm="layer")).train()
    labels = ids.clone()
    labels[0, :8] = -100
    count = int((labels[:, 1:] >= 0).sum())
    whole(ids, labels=labels).loss.backward()
    for i in range(2): parts(ids[i:i+1], labels=labels[i:i+1], num_items_in_batch=count).loss.backward()
    for p, q in zip(whole.parameters(), parts.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant, ids):
    plain, saving = build(dropout=.1).train(), build(dropout=.1).train()
    saving.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    if reentrant: saving.enable_input_require_grads()
    for m in (plain, saving):
        torch.manual_seed(1)
        m(ids, labels=ids).loss.backward()
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-7, msg=name)
    for a, b in zip(plain.buffers(), saving.buffers()): assert torch.equal(a, b)


def test_hidden_states_and_attentions_on_request(ids):
    model = build()
    model.set_attn_implementation("eager")
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 13))
    assert model(ids).hidden_states is None
    assert isinstance(model(ids, return_dict=False), tuple)


def test_bfloat16_autocast_trains(ids):
    model = build().train()
    with torch.autocast("cpu", torch.bfloat16): loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert abs(loss.item() - build().train()(ids, labels=ids).loss.item()) < .05


def test_a_copy_shares_its_own_tables(ids):
    model = build(share_memory=True)
    twin = copy.deepcopy(model)
    assert twin.model.layers[2].memory.expert_up is twin.model.layers[1].memory.expert_up is not model.model.layers[1].memory.expert_up
    assert torch.equal(twin(ids).logits, model(ids).logits)


def test_same_seed_same_model():
    a, b, c = build(1), build(1), build(2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
