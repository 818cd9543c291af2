"Attention with stored heads is Llama's: weights, outputs, gradients, cache, generation, cost; old configurations keep their identity"
import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from peer_nb.analysis.parameters import cache_numbers, count_parameters, layer_rows
from peer_nb.config import Config, ConfigError, apply_overrides, config_from_dict, config_hash
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.study.identity import section_hashes

torch.set_num_threads(1)
PEER = dict(num_experts=64, num_experts_per_tok=4, num_heads=2, product_key_dim=[8, 8], query_dim=16)
MLA = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8)
SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=40, vocab_size=97, max_position_embeddings=64)
KINDS = [("mha", None), ("gqa", 3), ("gqa", 2), ("mqa", None)]


def build(seed=0, implementation="sdpa", **changes):
    torch.manual_seed(seed)
    config = PeerMLAConfig(**SIZES | dict(peer_start_layer=1, peer_config=PEER, mla_config=MLA, initializer_range=.2) | changes)
    config._attn_implementation = implementation
    return PeerMLAForCausalLM(config).eval()


def llama(kind, stored, implementation="sdpa", rope=None):
    "Ours without memory, and Llama with its weights"
    mla = MLA | ({"rope_scaling": rope} if rope else {})
    ours = build(attention_kind=kind, num_key_value_heads=stored, use_peer=False, implementation=implementation, mla_config=mla)
    config = LlamaConfig(**SIZES, num_key_value_heads=ours.config.num_key_value_heads, rms_norm_eps=1e-5, rope_parameters=ours.config.rotary_parameters)
    config._attn_implementation = implementation
    theirs = LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.fixture
def ids(): return torch.randint(2, 97, (2, 13), generator=torch.Generator().manual_seed(3))


# ---- attention --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind, stored", KINDS)
def test_stored_heads_are_llamas(kind, stored, implementation, ids):
    "Logits with padding, loss and every gradient"
    ours, theirs = llama(kind, stored, implementation)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = dict(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids.masked_fill(mask == 0, -100))
    got, want = (model(**given) for model in (ours, theirs))
    assert (got.logits - want.logits)[mask.bool()].abs().max() < 2e-5
    for model, out in ((ours, got), (theirs, want)): out.loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters(): torch.testing.assert_close(p.grad, wanted[name].grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("rope", [dict(rope_type="yarn", factor=4, original_max_position_embeddings=16), dict(rope_type="linear", factor=2, original_max_position_embeddings=32)])
def test_stretched_rotation_is_llamas(rope, ids):
    ours, theirs = llama("gqa", 2, rope=rope)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 2e-5


@pytest.mark.parametrize("kind, stored", KINDS)
def test_decoding_is_the_whole_sequence_and_llamas(kind, stored, ids):
    ours, theirs = llama(kind, stored)
    whole, caches = ours(ids).logits, (DynamicCache(config=ours.config), StaticCache(config=ours.config, max_cache_len=16), DynamicCache())
    for cache in caches[:2]:
        pieces = [ours(part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 1, 3, 4], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=2e-5, rtol=1e-4)
    theirs(ids, past_key_values=caches[2], use_cache=True)
    for mine, other in zip(caches[0].layers, caches[2].layers):
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.values, other.values, atol=1e-5, rtol=1e-4)
    held = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in caches[0].layers)
    assert held == cache_numbers({**SIZES, "attention_kind": kind, "num_key_value_heads": stored})[0]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


def test_documents_side_by_side_with_shared_keys():
    model = build(attention_kind="gqa", num_key_value_heads=2)
    documents = [torch.randint(2, 97, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 7)]
    row, borders = torch.cat(documents, 1), torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    want = torch.cat([model(document).logits for document in documents], 1)
    torch.testing.assert_close(model(row, cu_seqlens=borders).logits, want, atol=1e-5, rtol=1e-4)


def test_another_models_cache_is_refused(ids):
    cache = build()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 1 heads of width 16; this model caches 2 of width 8"):
        build(attention_kind="gqa", num_key_value_heads=2)(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("kind, stored", KINDS)
def test_attention_costs_what_torch_counts(kind, stored):
    options = {**SIZES, "attention_kind": kind, "num_key_value_heads": stored, "peer_config": PEER, "mla_config": MLA, "peer_start_layer": 1, "memory_kind": "pkm"}
    with torch.device("meta"): model = PeerMLAForCausalLM(PeerMLAConfig(**options))
    assert count_parameters(options).total == sum(p.numel() for p in model.parameters()) == sum(row["total"] for row in layer_rows(options))
    dense = {**options, "use_peer": False}
    model = build(**{**dense, "implementation": "eager"})
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(torch.zeros(1, 32, dtype=torch.long))
    assert counter.get_total_flops() == 32*count_parameters(dense, 32).flops_per_token


def test_it_saves_compiles_and_checkpoints(tmp_path, ids):
    model = build(attention_kind="gqa", num_key_value_heads=3)
    model.save_pretrained(tmp_path)
    again = PeerMLAForCausalLM.from_pretrained(tmp_path)
    assert again.config.attention_kind == "gqa" and again.config.to_dict()["num_key_value_heads"] == 3
    assert build().config.to_dict()["num_key_value_heads"] is None and build().config.num_key_value_heads == 6
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    dense = build(attention_kind="gqa", num_key_value_heads=3, use_peer=False)
    compiled = torch.compile(copy.deepcopy(dense), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, dense(ids).logits)
    model.train().gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("wrong, key", [(dict(attention_kind="gqa"), "num_key_value_heads: is missing"), (dict(attention_kind="gqa", num_key_value_heads=4), "num_key_value_heads: 4 does not divide"),
                                        (dict(num_key_value_heads=2), "num_key_value_heads: 2 contradicts attention_kind: mla"), (dict(attention_kind="mqa", num_key_value_heads=2), "2 contradicts attention_kind: mqa"),
                                        (dict(attention_kind="mha", hidden_size=42), "num_attention_heads: 6 heads cannot share hidden_size = 42"), (dict(attention_kind="mlha"), "did you mean mla")])
def test_attention_that_contradicts_itself_is_refused(wrong, key):
    with pytest.raises(ConfigError, match=key) as said: config_from_dict(dict(model_config={**SIZES, "use_peer": False, **wrong}, dataset_config=dict(max_seq_length=64)), "run.yaml")
    assert str(said.value).startswith("run.yaml: model_config.")
    if "mlha" not in wrong.values():
        with pytest.raises(ValueError, match=key): PeerMLAConfig(**SIZES | wrong)


# ---- identity ---------------------------------------------------------------------------------------------------------

def test_configurations_of_earlier_versions_keep_their_fingerprints():
    "As the version before these keys wrote them into checkpoints and plans"
    assert config_hash(Config()) == "a00009cad8a071b346e495539de1d5e13a237c8294bf417592313e3b77970b1e"
    assert section_hashes(Config())["model_config"] == "7a8cfc1c11cf7c7c816838f3f5898f64347d7db4a46b443239cbb3ad140930a1"
    other = apply_overrides(Config(), {"model_config.attention_kind": "mha"})
    assert config_hash(other) != config_hash(Config()) and section_hashes(other)["model_config"] != section_hashes(Config())["model_config"]
