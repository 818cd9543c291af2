"The attention against DeepSeek's, and the model as transformers, peft, Trainer and lm-eval take it"
import copy
import math
import shutil

import pytest
import torch
from dataclasses import fields
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DeepseekV3ForCausalLM, DynamicCache, PreTrainedTokenizerFast, StaticCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

from peer_nb import config
from peer_nb.models.causal_lm import ChunkedCrossEntropy, PeerMLAConfig, PeerMLAForCausalLM, PeerMLAModel
from peer_nb.models.mla import LatentAttention, rotary_angles
from peer_nb.models.options import RopeScaling

torch.set_num_threads(1)
MLA = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8)
MEMORY = dict(num_experts=64, num_experts_per_tok=4, num_heads=2, product_key_dim=[8, 8], query_dim=16)
TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=97, max_position_embeddings=64,
            peer_start_layer=1, peer_config=MEMORY, mla_config=MLA, pad_token_id=0, eos_token_id=1)
YARN = dict(rope_type="yarn", factor=8, original_max_position_embeddings=8, mscale=1., mscale_all_dim=.8)


def build(seed=0, implementation="sdpa", **changes):
    torch.manual_seed(seed)
    model = PeerMLAForCausalLM(PeerMLAConfig(**TINY | changes)).eval()
    model.set_attn_implementation(implementation)
    return model


def largest(a, b): return (a - b).abs().max().item()


@pytest.fixture
def plain_flex():
    "Flex attention as written, without compiling it for the CPU first"
    with torch.compiler.set_stance("force_eager"): yield


@pytest.fixture
def ids(): return torch.randint(2, 97, (2, 13), generator=torch.Generator().manual_seed(3))


def padded(ids, n):
    "Padding on the left, and its mask"
    return (torch.cat([torch.zeros(len(ids), n, dtype=torch.long), ids], 1),
            torch.cat([torch.zeros(len(ids), n, dtype=torch.long), torch.ones_like(ids)], 1))


# the attention against transformers

def attention_pair(generation, q_lora_rank, implementation, rope=None):
    "Theirs, ours with the same weights, and both rotations"
    settings = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=6, kv_lora_rank=24, q_lora_rank=q_lora_rank, qk_nope_head_dim=16,
                    qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=64, rope_parameters=dict(rope_theta=1e4) | (rope or dict(rope_type="default")))
    cfg = DeepseekV2Config(**settings) if generation == 2 else DeepseekV3Config(**settings)
    cfg._attn_implementation = implementation
    module = deepseek_v2 if generation == 2 else deepseek_v3
    attention, rotary = getattr(module, f"DeepseekV{generation}Attention"), getattr(module, f"DeepseekV{generation}RotaryEmbedding")
    torch.manual_seed(1)
    theirs, ours = attention(cfg, 0), LatentAttention(cfg, 0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 1: p.uniform_(.5, 1.5)     # norm weights other than 1, so that their place shows
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours, rotary(cfg)


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("q_lora_rank", [None, 32])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("generation,rope", [(3, None), (2, None), (3, YARN), (2, YARN)], ids=["V3", "V2", "V3-yarn", "V2-yarn"])
def test_outputs_gradients_and_decoding_are_deepseeks(generation, rope, implementation, q_lora_rank, padding):
    theirs, ours, rotary = attention_pair(generation, q_lora_rank, implementation, rope)
    x, T = torch.randn(2, 24, 48), 24
    position = torch.arange(T)[None].expand(2, -1)
    allowed = torch.ones(T, T).tril().bool().expand(2, 1, -1, -1).clone()
    allowed[1, :, :, :padding] = False
    real = torch.ones(2, T, 1)
    real[1, :padding] = 0
    mask, angles = torch.where(allowed, 0., torch.finfo(torch.float32).min), rotary_angles(position, 8, 1e4, rope)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    want = theirs(inputs[0], attention_mask=mask, position_embeddings=rotary(x, position))[0] * real
    got = ours(inputs[1], angles, mask)[0] * real
    assert largest(got, want) <= 2e-6
    weight = torch.randn_like(want)
    for out in (want, got): (out * weight).sum().backward()
    pairs = [(a.grad, b.grad) for a, b in zip(theirs.parameters(), ours.parameters())] + [(inputs[0].grad, inputs[1].grad)]
    for a, b in pairs: assert largest(a, b) <= 1e-5 * a.abs().max()
    cache = DynamicCache()
    with torch.no_grad():
        steps = [ours(x[:, t:t+1], tuple(a[:, t:t+1] for a in angles), mask[:, :, t:t+1, :t+1], cache)[0] for t in range(T)]
    assert largest(torch.cat(steps, 1) * real, want) <= 2e-6


@pytest.mark.parametrize("rope", [dict(rope_type="linear", factor=4.), dict(rope_type="dynamic", factor=4.), YARN, YARN | dict(mscale=None, mscale_all_dim=None),
                                  YARN | dict(beta_fast=4., beta_slow=.2), YARN | dict(factor=1.)])
def test_stretched_rotation_is_transformers(rope):
    theirs, ours, rotary = attention_pair(3, None, "eager", {k: v for k, v in rope.items()})
    x, position, limit = torch.randn(1, 100, 48), torch.arange(100)[None], 64
    mask = torch.where(torch.ones(100, 100).tril().bool(), 0., torch.finfo(torch.float32).min)[None, None]
    scaling = dict(original_max_position_embeddings=limit) | rope
    assert largest(ours(x, rotary_angles(position, 8, 1e4, scaling), mask)[0], theirs(x, rotary(x, position), mask)[0]) <= 3e-6


def test_rope_scaling_is_the_packages():
    assert [f.name for f in fields(RopeScaling)] == [f.name for f in fields(config.RopeScaling)]
    assert RopeScaling("yarn", 2., 8).__dict__ == config.RopeScaling("yarn", 2., 8).__dict__


def test_stretched_contexts_decode_and_survive_saving(tmp_path, ids):
    for rope in (YARN, YARN | dict(rope_type="linear")):
        model = build(mla_config=MLA | dict(rope_scaling=rope), initializer_range=.2)
        assert largest(model(ids).logits, build(initializer_range=.2)(ids).logits) > 1e-3
        assert torch.equal(model.generate(ids, max_new_tokens=20), model.generate(ids, max_new_tokens=20, use_cache=False))
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.rotary_parameters == model.config.rotary_parameters and largest(loaded(ids).logits, model(ids).logits) <= 1e-6


# the cache

def prefilled(model, ids, cache):
    "A cache that holds all but the last token"
    with torch.no_grad(): model(ids[:, :-1], past_key_values=cache, use_cache=True)
    return cache


def forbid_expansion(model):
    def expand(*args): raise AssertionError("keys and values were rebuilt from the latents")
    for layer in model.model.layers: layer.self_attn.expand = expand


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=20)], ids=["dynamic", "static"])
def test_one_new_token_never_expands_the_cache(kind, implementation, ids, plain_flex):
    model = build(implementation="sdpa")
    with torch.no_grad():
        want = model(ids).logits[:, -1:]
        cache = prefilled(model, ids, kind(config=model.config))
        model.set_attn_implementation(implementation)
        forbid_expansion(model)
        assert largest(model(ids[:, -1:], past_key_values=cache, use_cache=True).logits, want) <= 2e-6
        with pytest.raises(AssertionError, match="rebuilt"): model(ids)


def test_the_cache_holds_latent_and_rotary_key(ids):
    model = build()
    cache = model(ids).past_key_values
    assert len(cache.layers) == 3
    for layer in cache.layers: assert layer.keys.numel() + layer.values.numel() == 2 * 13 * (MLA["kv_lora_rank"] + MLA["qk_rope_head_dim"])


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 12), max_size=12), implementation=st.sampled_from(["eager", "sdpa"]), padding=st.integers(0, 3), static=st.booleans())
def test_any_pieces_give_the_whole(cuts, implementation, padding, static):
    model = build(implementation=implementation)
    ids, mask = padded(torch.randint(2, 97, (2, 13), generator=torch.Generator().manual_seed(3)), padding)
    mask[0] = 1                                                         # one row has padding, the other doesn't
    cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    ends = [0, *sorted(c + padding for c in cuts), 13 + padding]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits
        pieces = [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True).logits for a, b in zip(ends, ends[1:])]
    got = torch.cat(pieces, 1)
    assert largest(got[0], whole[0]) <= 3e-6 and largest(got[1, padding:], whole[1, padding:]) <= 3e-6


def test_decoding_goes_the_long_way_where_the_weight_is_not_all(ids):
    model = build()
    hooked, quantised = copy.deepcopy(model), copy.deepcopy(model)
    for layer in hooked.model.layers: layer.self_attn.kv_b_proj.register_forward_hook(lambda module, args, out: out * 1.5)
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("kv_b_proj"))
    assert type(quantised.model.layers[0].self_attn.kv_b_proj) is nn.Linear     # the module's type doesn't tell
    with torch.no_grad():
        plain = model(ids).logits
        for changed in (hooked, quantised):
            whole, cache = changed(ids).logits, DynamicCache(config=model.config)
            steps = [changed(ids[:, t:t+1], past_key_values=cache, use_cache=True).logits for t in range(13)]
            assert largest(torch.cat(steps, 1), whole) <= 3e-6 and largest(whole, plain) > 1e-5


def test_absorbed_decoding_under_autocast(ids):
    model = build(use_peer=False)
    with torch.no_grad():
        want, cache = model(ids).logits[:, -1:], prefilled(model, ids, DynamicCache())
        with torch.autocast("cpu", torch.bfloat16): got = model(ids[:, -1:], past_key_values=cache).logits
    assert largest(got.float(), want) <= .03 * want.abs().max()


# documents in one row

def in_one_row(lengths, seed=0):
    "A row of random documents, and its borders"
    row = torch.randint(2, 97, (1, sum(lengths)), generator=torch.Generator().manual_seed(seed))
    return row, torch.tensor([0, *lengths]).cumsum(0).int()


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), implementation=st.sampled_from(["eager", "sdpa"]), place=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_documents_never_see_each_other(lengths, implementation, place, seed):
    model = build(implementation=implementation)
    row, borders = in_one_row(lengths, seed)
    place %= row.shape[1]
    edited = row.clone()
    edited[0, place] = 2 + (row[0, place] - 1) % 95
    with torch.no_grad():
        logits, other = (model(r, cu_seqlens=borders, max_seqlen=max(lengths)).logits[0] for r in (row, edited))
        alone = torch.cat([model(part).logits[0] for part in row.split(lengths, 1)])
    assert largest(logits, alone) <= 3e-6
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    elsewhere = document != document[place]
    assert torch.equal(logits[elsewhere], other[elsewhere])             # not a bit
    assert not torch.equal(logits[place], other[place])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_train_as_if_alone(checkpointing):
    lengths = [5, 1, 8]
    row, borders = in_one_row(lengths)
    together, alone = build().train(), build().train()
    if checkpointing: together.gradient_checkpointing_enable()
    count = sum(lengths) - len(lengths)
    loss = together(row, labels=row, cu_seqlens=borders, max_seqlen=8, position_ids=torch.cat([torch.arange(n) for n in lengths])[None]).loss
    losses = [alone(part, labels=part, num_items_in_batch=count).loss for part in row.split(lengths, 1)]
    assert abs(loss.item() - sum(losses).item()) <= 1e-5
    for part in (loss, sum(losses)): part.backward()
    for p, q in zip(together.parameters(), alone.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    chunked = build(loss_chunk_size=3)(row, labels=row, cu_seqlens=borders)
    assert chunked.logits is None and abs(chunked.loss.item() - loss.item()) <= 1e-5


def test_the_loss_of_a_document_has_no_gradient_in_another():
    model, (row, borders) = build(), in_one_row([6, 7])
    embedded = model.get_input_embeddings()(row).detach().requires_grad_()
    labels = row.clone()
    labels[:, :6] = -100
    model(inputs_embeds=embedded, labels=labels, cu_seqlens=borders).loss.backward()
    assert embedded.grad[0, :6].abs().max() == 0 and embedded.grad[0, 6:].abs().max() > 0


def test_documents_without_borders_are_read_from_positions():
    "As transformers does for position_ids that begin anew"
    model, (row, borders) = build(), in_one_row([6, 7])
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    assert largest(model(row, position_ids=positions).logits, model(row, cu_seqlens=borders).logits) <= 2e-6


# implementations, weights, precision

def test_implementations_agree(ids, plain_flex):
    left, mask = padded(ids, 3)
    row, borders = in_one_row([6, 7, 1])
    model = build()
    with torch.no_grad():
        wants = [f() for f in (lambda: model(ids).logits, lambda: model(left, attention_mask=mask).logits[:, 3:], lambda: model(row, cu_seqlens=borders).logits)]
        for implementation in ("eager", "flex_attention"):
            model.set_attn_implementation(implementation)
            gots = model(ids).logits, model(left, attention_mask=mask).logits[:, 3:], model(row, cu_seqlens=borders).logits
            for got, want in zip(gots, wants): assert largest(got, want) <= 3e-6


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_attention_weights(implementation, ids, plain_flex):
    model, (row, borders) = build(implementation=implementation), in_one_row([6, 7])
    with torch.no_grad():
        out, cache = model(ids, output_attentions=True), prefilled(build(), ids, DynamicCache())
        packed = model(row, cu_seqlens=borders, output_attentions=True).attentions
        last = model(ids[:, -1:], past_key_values=cache, output_attentions=True).attentions
        attention, normed = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm(model.get_input_embeddings()(ids))
        angles = rotary_angles(torch.arange(13)[None], 8)
        query = torch.cat(attention.queries(normed, *angles), -1)
        key, _ = attention.expand(*attention.latents(normed, *angles))
    by_hand = (query.double() @ key.double().mT / math.sqrt(16)).masked_fill(torch.ones(13, 13).triu(1).bool(), -math.inf).softmax(-1)
    assert len(out.attentions) == 3 and largest(out.attentions[0], by_hand) <= 1e-6
    assert largest(out.logits, build()(ids).logits) <= 2e-6
    for weights, whole in zip(last, out.attentions): assert largest(weights, whole[:, :, -1:]) <= 2e-6
    assert packed[0][0, :, 6:, :6].abs().max() == 0 and largest(packed[0].sum(-1), torch.ones(1, 4, 13)) <= 1e-6


def test_bfloat16_loads_and_generates(tmp_path, ids):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(ids).logits.dtype == torch.bfloat16
    dense = [build(use_peer=False), build(use_peer=False).bfloat16()]       # rounding may retrieve other experts, so close numbers are promised here
    assert largest(dense[1](ids).logits.float(), dense[0](ids).logits) < .05 * dense[0](ids).logits.abs().max()
    assert loaded.generate(ids, max_new_tokens=4, min_new_tokens=4).shape == (2, 17)


# as one of transformers' own

def test_auto_classes(tmp_path, ids):
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PeerMLAConfig
    assert type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))) is PeerMLAForCausalLM
    with safe_open(tmp_path/"model.safetensors", "pt") as file: assert "lm_head.weight" not in file.keys()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values()): assert torch.equal(a, b), name
    loaded.resize_token_embeddings(101)
    assert loaded(ids).logits.shape[-1] == 101 and loaded.config.vocab_size == 101


def test_the_decoder_alone_is_an_auto_model(tmp_path, ids):
    model = build()
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is PeerMLAModel
    assert largest(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state) <= 1e-6


GENERATION = {"greedy": dict(), "sampling": dict(do_sample=True, top_p=.9), "beams": dict(num_beams=3), "sampled beams": dict(num_beams=2, do_sample=True),
              "static": dict(cache_implementation="static"), "lookup": dict(prompt_lookup_num_tokens=3)}


@pytest.mark.parametrize("dense", [False, True], ids=["memory", "dense"])
@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("way", GENERATION)
def test_generation_with_a_cache_is_generation_without(way, left, dense, ids):
    model, options = build(initializer_range=.2, use_peer=not dense), dict(max_new_tokens=8, do_sample=False) | GENERATION[way]
    rows, mask = padded(ids[:1] if way == "lookup" else ids, left)
    if way != "lookup": mask[0], rows[0, :left] = 1, 5                  # only the second row is padded
    without = {k: v for k, v in options.items() if k not in ("cache_implementation", "prompt_lookup_num_tokens")}
    results = []
    for given in (options, without | dict(use_cache=False)):
        torch.manual_seed(7)
        results.append(model.generate(rows, attention_mask=mask, **given))
    assert torch.equal(*results)
    if left and way in ("greedy", "beams", "static"):
        alone = model.generate(ids[1:], attention_mask=torch.ones_like(ids[1:]), **options)
        assert torch.equal(results[0][1, left:left + alone.shape[1]], alone[0])


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=20), dict(rope_scaling=YARN), dict(rope_theta=500.)])
@pytest.mark.parametrize("tied", [False, True])
def test_state_dicts_are_exchanged_with_deepseek(changes, tied, ids):
    ours = build(use_peer=False, mla_config=MLA | changes, tie_word_embeddings=tied)
    c = ours.config
    torch.manual_seed(5)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_attention_heads, vocab_size=c.vocab_size, rms_norm_eps=c.layer_norm_eps, first_k_dense_replace=c.num_hidden_layers,
        num_mtp_layers=0, max_position_embeddings=c.max_position_embeddings, tie_word_embeddings=tied, rope_parameters=c.rotary_parameters,
        **{k: v for k, v in c.mla_config.items() if not k.startswith("rope_")})).eval()
    left, mask = padded(ids, 4)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            for p in source.parameters(): p.add_(torch.randn_like(p), alpha=.01)
        target.load_state_dict(source.state_dict(), strict=True)
        assert largest(ours(ids).logits, theirs(ids).logits) <= 1e-6
        assert largest(ours(left, attention_mask=mask).logits[:, 4:], theirs(left, attention_mask=mask).logits[:, 4:]) <= 1e-6
        assert largest(ours(ids, labels=ids).loss, theirs(ids, labels=ids).loss) <= 1e-6


@pytest.mark.parametrize("options,padding", [({}, 0), (dict(q_lora_rank=20, rope_scaling=YARN), 3)])
def test_the_dense_path_compiles_into_one_graph(options, padding, ids):
    plain, compiled = (build(use_peer=False, num_hidden_layers=1, mla_config=MLA | options).train() for _ in range(2))
    left, mask = padded(ids, padding)
    given = dict(input_ids=left, labels=left.masked_fill(left == 0, -100), use_cache=False) | (dict(attention_mask=mask) if padding else {})
    losses = plain(**given).loss, torch.compile(compiled, fullgraph=True, backend="aot_eager")(**given).loss
    for loss in losses: loss.backward()
    assert largest(*losses) <= 1e-6
    for p, q in zip(plain.parameters(), compiled.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    torch._dynamo.reset()


def test_a_decoding_step_compiles_into_one_graph(ids):
    model = build(use_peer=False, num_hidden_layers=1)
    with torch.no_grad():
        want, cache = model(ids).logits[:, -1:], prefilled(model, ids, StaticCache(config=model.config, max_cache_len=20))
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert largest(step(ids[:, -1:], past_key_values=cache, use_cache=True).logits, want) <= 2e-6
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_dense_path_compiles_with_inductor(ids):
    plain, compiled = build(use_peer=False).train(), build(use_peer=False).train()
    losses = plain(ids, labels=ids).loss, torch.compile(compiled, fullgraph=True)(ids, labels=ids).loss
    for loss in losses: loss.backward()
    for p, q in zip(plain.parameters(), compiled.parameters()): torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


# cross-entropy in chunks

@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 20), words=st.integers(1, 30), chunk=st.integers(1, 25), seed=st.integers(0, 10**6))
def test_chunks_are_the_whole_cross_entropy(n, words, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 5, generator=g).requires_grad_(), torch.randn(words, 5, generator=g).requires_grad_()
    labels = torch.randint(0, words, (n,), generator=g)
    labels[torch.rand(n, generator=g) < .3] = -100
    got = ChunkedCrossEntropy.apply(hidden, weight, labels, chunk, True)
    want = nn.functional.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True), dict(use_peer=False)])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_in_chunks_is_training_in_one(changes, autocast, ids):
    plain, chunked = build(**changes).train(), build(**changes, loss_chunk_size=4).train()
    labels = ids.clone()
    labels[0, :5] = -100
    losses = []
    for model in (plain, chunked):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): out = model(ids, labels=labels)
        out.loss.backward()
        losses.append(out)
    assert losses[0].logits is not None and losses[1].logits is None and losses[1].loss.dtype == torch.float32
    assert largest(losses[0].loss, losses[1].loss) <= (2e-3 if autocast else 1e-6)
    for p, q in zip(plain.parameters(), chunked.parameters()):
        assert largest(p.grad, q.grad) <= (.02 if autocast else 1e-6) * max(1, p.grad.abs().max())
    assert chunked(ids).logits is not None
    with torch.no_grad(): evaluated = [model.eval()(ids, labels=labels) for model in (plain, chunked)]     # metrics want logits
    assert largest(*(out.logits for out in evaluated)) <= 1e-5 and largest(*(out.loss for out in evaluated)) <= 1e-5


@pytest.mark.parametrize("kind,tables", [("peer", ["expert_down", "expert_up"]), ("pkm", ["values"]), ("memory_plus", ["values"])])
def test_sparse_table_gradients_are_the_dense_ones(kind, tables, ids):
    dense, sparse = (build(memory_kind=kind, peer_config=MEMORY | dict(table_gradient=layout)).train() for layout in ("dense", "sparse"))
    for model in (dense, sparse): model(ids, labels=ids).loss.backward()
    for (name, p), q in zip(dense.named_parameters(), sparse.parameters()):
        assert q.grad.is_sparse == any(name.endswith(f"{table}.weight") for table in tables)
        assert largest(p.grad, q.grad.to_dense()) <= 1e-6


# peft, Trainer, lm-eval

def adapted(targets, **changes):
    "A model with a LoRA adapter that changes something"
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(build(**changes), peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")).eval()


@pytest.mark.parametrize("targets", [["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"], ["expert_down", "expert_up"], ["kv_b_proj", "expert_up"], "all-linear"],
                         ids=["attention", "tables", "both", "all-linear"])
def test_lora_trains_saves_loads_and_merges(targets, tmp_path, ids):
    from peft import PeftModel
    model, base = adapted(targets), build()
    with torch.no_grad():
        out, plain = model(ids).logits, base(ids).logits
        assert largest(out, plain) > 1e-4
        cache = DynamicCache()
        steps = [model(input_ids=ids[:, t:t+1], past_key_values=cache, use_cache=True).logits for t in range(13)]
        assert largest(torch.cat(steps, 1), out) <= 5e-6
        with model.disable_adapter(): assert largest(model(ids).logits, plain) <= 1e-6
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and grad is not None and grad.abs().max() > 0 for name, grad in trained.items())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        again = PeftModel.from_pretrained(build(), tmp_path).eval()
        assert largest(again(ids).logits, out) <= 1e-6
        merged = again.merge_and_unload()
        assert type(merged) is PeerMLAForCausalLM and largest(merged(ids).logits, out) <= 2e-5
        assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in base.named_parameters()}


def test_lora_on_tables_by_parameter_name(ids):
    "What peft calls target_parameters"
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    options = peft.LoraConfig(r=2, target_modules=[], target_parameters=["expert_up.weight"], init_lora_weights=False)
    model = peft.get_peft_model(build(), options).eval()
    out = model(ids).logits
    assert largest(out, build()(ids).logits) > 1e-4
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert len(grads) == 4 and all(grad is not None and grad.abs().max() > 0 for grad in grads)
    assert largest(model.eval().merge_and_unload()(ids).logits, out) <= 2e-5


def test_an_adapter_on_the_head_brings_its_logits(ids):
    out = adapted(["lm_head"], loss_chunk_size=4)(input_ids=ids, labels=ids)
    assert out.logits is not None and torch.isfinite(out.loss)


def test_trainer_trains(tmp_path, ids):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments
    model = build()
    rows = [dict(input_ids=row, labels=row) for row in torch.randint(2, 97, (20, 13), generator=torch.Generator().manual_seed(1))]
    arguments = TrainingArguments(tmp_path, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1,
                                  report_to=[], use_cpu=True, save_steps=5, disable_tqdm=True, gradient_checkpointing=True)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path/"checkpoint-5").eval()
    assert largest(loaded(ids).logits, model.eval()(ids).logits) <= 1e-6


def tokenizer_of_letters():
    "97 tokens: an end of text and single characters"
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocab = {"<|endoftext|>": 0} | {chr(31 + i): i for i in range(1, 97)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>")


def test_lm_evals_log_likelihood_is_the_hand_computed():
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    model, tokenizer = build(initializer_range=.1), tokenizer_of_letters()
    texts = [("the cat", " sat"), ("a", " longer continuation"), ("", "alone"), ("of unequal lengths", "!")]
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu", max_length=64)
    got = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(texts)])
    for (context, continuation), (total, greedy) in zip(texts, got):
        a, b = tokenizer(context or "<|endoftext|>")["input_ids"], tokenizer(continuation)["input_ids"]
        assert len(b) == len(continuation)
        logp = model(torch.tensor([a + b])).logits[0].double().log_softmax(-1)
        want = sum(logp[len(a) + i - 1, token].item() for i, token in enumerate(b))
        assert abs(total - want) <= 1e-4
        assert greedy == all(logp[len(a) + i - 1].argmax() == token for i, token in enumerate(b))


# bad input

@pytest.mark.parametrize("given,message", [
    (dict(input_ids=torch.zeros(7).long()), r"input_ids has shape \(7,\); it must be \[batch, length\]"),
    (dict(input_ids=torch.zeros(2, 7)), "input_ids is torch.float32; it must hold integers"),
    (dict(input_ids=torch.full((1, 7), 97)), "input_ids holds 97; allowed: 0 to 96"),
    (dict(input_ids=torch.full((1, 7), -1)), "input_ids holds -1; allowed: 0 to 96"),
    (dict(inputs_embeds=torch.zeros(1, 7, 31)), r"inputs_embeds has shape \(1, 7, 31\); it must be \(1, 7, 32\)"),
    (dict(inputs_embeds=torch.zeros(1, 7, 32).long()), "inputs_embeds is torch.int64; it must hold floating-point numbers"),
    (dict(input_ids=torch.zeros(1, 65).long()), "the sequence has 65 tokens; max_position_embeddings allows 64"),
    (dict(input_ids=torch.zeros(2, 7).long(), attention_mask=torch.ones(2, 8)), r"attention_mask has shape \(2, 8\); it must be \(2, 7\)"),
    (dict(input_ids=torch.zeros(2, 7).long(), position_ids=torch.arange(7)), r"position_ids has shape \(7,\); it must be \(2, 7\) or \(1, 7\)"),
    (dict(input_ids=torch.zeros(2, 7).long(), labels=torch.zeros(2, 6).long()), r"labels has shape \(2, 6\); it must be \(2, 7\)"),
    (dict(input_ids=torch.zeros(1, 7).long(), cu_seqlens=torch.tensor([0, 3, 8])), r"cu_seqlens=\[0, 3, 8\] must rise from 0 to 7.*ends at \[8\]"),
    (dict(input_ids=torch.zeros(1, 7).long(), cu_seqlens=torch.tensor([0, 5, 3, 7])), "cu_seqlens.*must rise"),
    (dict(input_ids=torch.zeros(1, 7).long(), cu_seqlens=torch.tensor([[0, 7]])), r"cu_seqlens is torch.int64 of shape \(1, 2\)"),
    (dict(input_ids=torch.zeros(2, 7).long(), cu_seqlens=torch.tensor([0, 7])), "cu_seqlens divides one row; the batch has 2"),
    (dict(input_ids=torch.zeros(1, 7).long(), cu_seqlens=torch.tensor([0, 2, 7]), max_seqlen=4), "max_seqlen=4, but cu_seqlens has a document of 5 tokens"),
    (dict(input_ids=torch.zeros(1, 7).long(), cu_seqlens=torch.tensor([0, 7]), attention_mask=torch.ones(1, 7)), "attention_mask cannot be combined with cu_seqlens"),
    (dict(input_ids=torch.zeros(1, 7).long(), cu_seqlens=torch.tensor([0, 7]), use_cache=True), "use_cache cannot be combined with cu_seqlens"),
    (dict(), "give either input_ids or inputs_embeds")])
def test_what_does_not_fit_is_refused(given, message):
    with pytest.raises((ValueError, TypeError), match=message): build()(**given)


def test_the_last_position_is_the_last(ids):
    "With a cache, without, in generation: as many tokens as there are positions, and not one more"
    model = build()
    row = ids[:1].repeat(1, 5)[:, :64]
    cache = prefilled(model, row, DynamicCache())
    assert model(row[:, -1:], past_key_values=cache).logits.shape == (1, 1, 97)
    with pytest.raises(ValueError, match="65 tokens .64 of them in past_key_values.; max_position_embeddings allows 64"): model(row[:, -1:], past_key_values=cache)
    static = prefilled(model, row, StaticCache(config=model.config, max_cache_len=80))
    model(row[:, -1:], past_key_values=static)
    with pytest.raises(ValueError, match="max_position_embeddings allows 64"): model(row[:, -1:], past_key_values=static)
    for options in (dict(), dict(cache_implementation="static"), dict(num_beams=2)):
        assert model.generate(ids, max_new_tokens=51, min_new_tokens=51, **options).shape == (2, 64)
        with pytest.raises(ValueError, match="65 tokens; max_position_embeddings allows 64"): model.generate(ids, max_new_tokens=52, **options)
    row, borders = in_one_row([64, 64, 3])
    assert model(row, cu_seqlens=borders).logits.shape == (1, 131, 97)      # the limit is a document's, not the row's
    row, borders = in_one_row([3, 65])
    with pytest.raises(ValueError, match="the sequence has 65 tokens"): model(row, cu_seqlens=borders)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_an_empty_batch_works(implementation, ids, plain_flex):
    model = build(implementation=implementation)
    for given in (dict(input_ids=ids[:0]), dict(input_ids=ids[:0], attention_mask=torch.ones(0, 13)), dict(inputs_embeds=torch.zeros(0, 13, 32))):
        with torch.no_grad(): assert model(**given).logits.shape == (0, 13, 97)
    if implementation == "flex_attention": return                           # trains on GPUs only
    for m in (model.train(), build(implementation=implementation, loss_chunk_size=4).train()):
        loss = m(ids[:0], labels=ids[:0], num_items_in_batch=7).loss
        loss.backward()
        assert loss == 0
