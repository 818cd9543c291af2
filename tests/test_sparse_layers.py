"Attention with stored heads is Llama's, a mixture of experts DeepSeek's: weights, outputs, gradients, generation, cost; old configurations keep their identity"
import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from peer_nb.analysis.hooks import reading, retrieval_columns
from peer_nb.analysis.parameters import cache_numbers, count_parameters, layer_rows
from peer_nb.config import Config, ConfigError, DatasetConfig, apply_overrides, config_from_dict, config_hash, load_config, to_dict
from peer_nb.data.corpora import load_tokenizer
from peer_nb.files import UserError
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.models.engram import Engram, canonical_map
from peer_nb.models.moe import MixtureOfExperts, balance_loss, fused_linear, fused_takes, grouped_linear, grouped_linear_reference, routed_experts_reference, update_expert_bias, within_groups
from peer_nb.models.options import EngramConfig, MoeConfig
from peer_nb.models.ultramem import tucker_top_k
from peer_nb.study.identity import section_hashes
from peer_nb.study.sparse_layer import SPARSE_KINDS, residual_of, residual_rows, sparse_layer_levels
from peer_nb.study.study import BUILTIN_AXES, builtin_axes, load_study
from peer_nb.training.tracking import UsageRecorder

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


# ---- mixture of experts -----------------------------------------------------------------------------------------------

EXPERTS = dict(n_routed_experts=12, num_experts_per_tok=3, moe_intermediate_size=10, n_shared_experts=2, routed_scaling_factor=2.5)
GROUPS = [dict(), dict(n_group=4, topk_group=2), dict(n_group=3, topk_group=1, norm_topk_prob=False)]


def mixture(seed=0, bias=1., **moe):
    "A model with two mixtures of experts; biases that are not zero"
    model = build(seed, memory_kind="moe", num_hidden_layers=3, moe_config=EXPERTS | moe)
    for layer in model.model.layers[1:]: layer.mlp.gate.e_score_correction_bias.normal_(std=bias)
    return model


@pytest.mark.parametrize("groups", GROUPS)
def test_a_model_with_experts_is_deepseeks(groups, ids):
    "Every weight and bias by strict state dict; logits and gradients"
    ours = mixture(**groups)
    c = ours.config
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES | dict(num_hidden_layers=3), num_key_value_heads=6, rms_norm_eps=1e-5, first_k_dense_replace=1, num_mtp_layers=0,
        rope_parameters=c.rotary_parameters, **MLA, **dict(n_group=1, topk_group=1, norm_topk_prob=True) | EXPERTS | groups)).eval()
    theirs.set_experts_implementation("eager")
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    got, want = (model(ids, labels=ids) for model in (ours, theirs))
    assert (got.logits - want.logits).abs().max() < 2e-5
    for out in (got, want): out.loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters(): torch.testing.assert_close(p.grad, wanted[name].grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("groups", GROUPS)
def test_the_layer_is_deepseeks_to_a_millionth(groups):
    torch.manual_seed(1)
    options = dict(n_group=1, topk_group=1, norm_topk_prob=True) | EXPERTS | groups
    settings = DeepseekV3Config(hidden_size=16, **options)
    settings._experts_implementation = "eager"
    theirs, ours = DeepseekV3MoE(settings), MixtureOfExperts(16, MoeConfig(**options))
    with torch.no_grad():
        for p in theirs.parameters(): p.normal_(std=.2)
        theirs.gate.e_score_correction_bias.normal_()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = [torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2)).requires_grad_() for _ in range(2)]
    outs = [layer(x) for layer, x in zip((theirs, ours), inputs)]
    for out in outs: out.square().mean().backward()
    for a, b in [outs, [x.grad for x in inputs], *[(p.grad, ours.get_parameter(name).grad) for name, p in theirs.named_parameters()]]: assert (a - b).abs().max() <= 1e-6


def test_groups_stay_out_when_all_scores_are_negative():
    "Masked by zero, as an older transformers did, experts of other groups would win"
    choice = -torch.rand(50, 12) - .1
    best = within_groups(choice, 4, 1).topk(3, -1)
    assert (best.values < 0).all() and all(len({int(e) // 3 for e in row}) == 1 for row in best.indices)


@pytest.mark.parametrize("seed", range(2))
def test_the_grouped_path_is_its_slow_twin(seed):
    torch.manual_seed(seed)
    ends = torch.randint(0, 21, (5,)).sort().values
    ends[-1] = 20
    x, weight, g = torch.randn(20, 6).double().requires_grad_(), torch.randn(5, 4, 6).double().requires_grad_(), torch.randn(20, 4).double()
    grouped, twin = (torch.autograd.grad(way, (x, weight), g) for way in (grouped_linear(x, weight, ends), grouped_linear_reference(x, weight, ends.tolist())))
    for a, b in zip(grouped, twin): torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_linear(a, b, ends).sin(), (x, weight))
    layer, index = MixtureOfExperts(6, MoeConfig(5, 2, 1, 4)).double(), torch.rand(20, 5).topk(2)[1]
    weights = torch.rand(20, 2).double().requires_grad_()
    results = []
    for way in (layer.experts, lambda *given: routed_experts_reference(layer.experts, *given)):
        out = way(x, weights, index)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, weights, *layer.experts.parameters()))))
    for a, b in zip(*results): torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_call_that_a_gpu_gets_is_the_twin():
    "torch's grouped kernel also runs on the CPU, where only this test asks for it"
    ends, g = torch.tensor([3, 3, 11, 20]), torch.randn(20, 16)
    x, weight = torch.randn(20, 8).requires_grad_(), torch.randn(4, 16, 8).requires_grad_()
    for a, b in zip(*[(out, *torch.autograd.grad(out, (x, weight), g)) for out in (fused_linear(x, weight, ends), grouped_linear_reference(x, weight, ends.tolist()))]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert not fused_takes(x, weight)


def test_balance_losses_are_transformers():
    "Mixtral's helper counts a token k times, and is k where ours is one"
    logits = torch.randn(40, 8)
    index = logits.softmax(-1).topk(2, -1)[1]
    torch.testing.assert_close(2*balance_loss(logits.softmax(-1)[None], index[None]), load_balancing_loss_func((logits,), 8, 2))
    mask = torch.arange(10) < torch.tensor([[10], [3], [7], [1]])
    mine = balance_loss(logits.softmax(-1)[None], index[None], mask.flatten()[None])
    torch.testing.assert_close(2*mine, load_balancing_loss_func((logits,), 8, 2, attention_mask=mask.long()))
    layer = MixtureOfExperts(6, MoeConfig(5, 2, 1, 4, balance="none", z_loss_coefficient=.5))
    x, terms = torch.randn(3, 4, 6), []
    layer(x, terms=terms)
    torch.testing.assert_close(terms[0], .5*router_z_loss_func(layer.gate(x.view(12, 6))[3].view(3, 4, 5)))


@pytest.mark.parametrize("balance", ["switch", "sequence"])
def test_a_balance_loss_bends_the_gradient_and_not_the_number(balance, ids):
    "By hand from every layer's router, in one batch and in two of unequal weight"
    plain, bent = (mixture(bias=0., balance=name, balance_coefficient=.3).train() for name in ("none", balance))
    losses = [model(ids, labels=ids) for model in (plain, bent)]
    torch.testing.assert_close(*[out.loss for out in losses])
    terms = []
    plain.zero_grad()
    def add(layer, args, out): terms.append(layer.loss_terms(*[layer.gate(args[0].flatten(0, 1))[i] for i in (2, 1, 3)], None, args[0].shape))
    for layer in plain.model.layers[1:]:
        layer.mlp.options = MoeConfig(**bent.config.moe_config)
        layer.mlp.register_forward_hook(add)
    (plain(ids, labels=ids).loss + sum(terms)).backward()
    losses[1].loss.backward()
    for (name, p), q in zip(bent.named_parameters(), plain.parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-4, msg=name)
    if balance == "switch": return
    bent.zero_grad()
    for row in ids: bent(row[None], labels=row[None], num_items_in_batch=24).loss.backward()     # rows of twelve predictions each
    for (name, p), q in zip(bent.named_parameters(), plain.parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-3, msg=name)


def test_the_bias_moves_by_the_whole_steps_load(ids):
    "Batches of a step are added up, padding is not counted, a repeated pass counts once, evaluation and frozen routers change nothing"
    model = mixture(bias=0., bias_update_rate=.25).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    chosen = [[] for _ in gates]
    for gate, found in zip(gates, chosen): gate.register_forward_hook(lambda m, args, out, found=found: found.append(out[1]))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for _ in range(2): model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    for gate, found in zip(gates, chosen):
        index = torch.stack(found[:1] + found[-1:])                                   # of each batch, not of its repetition
        want = torch.bincount(index[:, mask.flatten().bool()].flatten(), minlength=12)
        assert torch.equal(gate.load, want) and want.sum() == 2*22*3
        gate.wanted = .25*(want.double().mean() - want).sign()
    gates[1].weight.requires_grad_(False)
    update_expert_bias(model)
    torch.testing.assert_close(gates[0].e_score_correction_bias, gates[0].wanted.float())
    assert not gates[1].e_score_correction_bias.any() and not any(gate.load.any() for gate in gates)
    model.eval()(ids)
    assert not gates[0].load.any()


def test_reentrant_checkpoints_cannot_carry_a_balance_loss(ids):
    model = mixture(balance="switch").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"): model(ids, labels=ids, use_cache=False)


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from peer_nb.models.engram import Engram, canonical_map
from peer_nb.models.moe import MixtureOfExperts, update_expert_bias
from peer_nb.models.options import EngramConfig, MoeConfig
from peer_nb.models.ultramem import tucker_top_k
torch.set_num_threads(1)
rank, where = int(sys.argv[1]), sys.argv[2]
def build():
    torch.manual_seed(0)
    layer = MixtureOfExperts(6, MoeConfig(5, 2, 1, 4, bias_update_rate=.1)).double()
    torch.nn.init.normal_(layer.gate.weight)
    return layer.train()
x = torch.randn(3, 4, 10, 6, generator=torch.Generator().manual_seed(1)).double() + 1
whole, layer = build(), build()
alone, steps = torch.optim.SGD(whole.parameters(), .1), []
for batch in x:                                                     # before there are two of us
    whole(batch).square().sum().backward()
    alone.step(); alone.zero_grad()
    update_expert_bias(whole)
    steps.append(whole.gate.e_score_correction_bias.clone())
dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=2)
parallel, optimizer = DistributedDataParallel(layer, broadcast_buffers=False), torch.optim.SGD(layer.parameters(), .1)
for batch, want in zip(x, steps):
    (2*parallel(batch[[slice(0, 1), slice(1, 4)][rank]]).square().sum()).backward()     # uneven parts
    optimizer.step(); optimizer.zero_grad()
    update_expert_bias(layer)
    torch.testing.assert_close(layer.gate.e_score_correction_bias, want, rtol=0, atol=0)
for p, q in zip(layer.parameters(), whole.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
dist.destroy_process_group()
print("equal")
"""


def test_two_processes_balance_like_one(tmp_path):
    both = [subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path/"meeting")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    outputs = [p.communicate(timeout=600) for p in both]
    for p, (out, err) in zip(both, outputs): assert p.returncode == 0 and out.strip() == "equal", err


@pytest.mark.parametrize("moe, kinds", [(dict(), dict(memory_layers=[0, 2])), (dict(n_shared_experts=0), dict(tie_word_embeddings=True)), (dict(n_group=4, topk_group=2), dict(attention_kind="mqa"))])
def test_experts_cost_what_is_counted(moe, kinds):
    "Parameters of a model without numbers; operations as torch counts those of transformers' experts"
    options = {**SIZES, "num_hidden_layers": 3, "mla_config": MLA, "peer_start_layer": 1, "memory_kind": "moe", "moe_config": EXPERTS | moe, **kinds}
    with torch.device("meta"): model = PeerMLAForCausalLM(PeerMLAConfig(**options))
    count = count_parameters(options)
    assert count.total == sum(p.numel() for p in model.parameters()) == sum(row["total"] for row in layer_rows(options))
    idle = 2 * (12 - 3) * 3*48*10                                                    # experts that a token does not choose, in both layers
    assert count.active == count.total - idle - (0 if options.get("tie_word_embeddings") else 96*48)
    if moe.get("n_shared_experts") == 0 or "attention_kind" in kinds: return
    settings = DeepseekV3Config(hidden_size=48, **dict(n_group=1, topk_group=1, norm_topk_prob=True) | EXPERTS | moe)
    settings._experts_implementation = "eager"
    theirs = DeepseekV3MoE(settings)
    torch.nn.init.normal_(theirs.gate.weight)
    for p in theirs.experts.parameters(): torch.nn.init.normal_(p)
    with FlopCounterMode(display=False) as counter, torch.no_grad(): theirs(torch.randn(1, 32, 48))
    dense = count_parameters({**options, "use_peer": False}, 32).flops_per_token
    assert 32*(count_parameters(options, 32).flops_per_token - dense + 2*2*3*48*40) == 2*counter.get_total_flops()


@pytest.mark.slow
def test_experts_save_generate_compile_and_are_adapted(tmp_path, ids):
    from peft import LoraConfig, get_peft_model
    from peer_nb.lora_targets import aliases_of
    model = mixture()
    model.save_pretrained(tmp_path)
    again = PeerMLAForCausalLM.from_pretrained(tmp_path)
    for a, b in zip(again.state_dict().values(), model.state_dict().values()): assert torch.equal(a, b)
    assert PeerMLAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    train = mixture(balance="sequence").train()
    twin = copy.deepcopy(train)
    losses = train(ids, labels=ids).loss, torch.compile(twin, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss
    for loss in losses: loss.backward()
    for (name, p), q in zip(train.named_parameters(), twin.parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)
    torch._dynamo.reset()
    adapted = get_peft_model(mixture(), LoraConfig(r=2, target_modules=aliases_of("peer_mla")["mlp"]))
    names = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("mlp.shared_experts.gate_proj.lora_A" in name for name in names)


def test_usage_of_experts_is_their_load(ids):
    model = mixture(balance="none").train()
    recorder = UsageRecorder(model, Config().model_config.peer_config.__class__(log_freq=1))
    recorder.before(1)
    chosen = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda m, args, out: chosen.append(out[1]))
    model(ids)
    record = recorder.after(1)["model.layers.1.mlp"]
    load = torch.bincount(chosen[0].flatten(), minlength=12).double()
    assert record["tokens"] == 26 and record["max_violation"] == pytest.approx(float(load.max()/load.mean() - 1))


@pytest.mark.parametrize("wrong, key", [(dict(n_group=5), "n_group: 5 groups do not divide"), (dict(topk_group=2), "topk_group: 2 of"), (dict(scoring="softmax"), "balance: loss_free has no meaning"),
                                        (dict(num_experts_per_tok=65), "num_experts_per_tok: 65 experts cannot"), (dict(n_group=64, topk_group=32), "n_group: groups of one expert")])
def test_experts_that_contradict_themselves_are_refused(wrong, key):
    with pytest.raises(ConfigError, match=f"run.yaml: model_config.moe_config.{key}"): config_from_dict(dict(model_config=dict(memory_kind="moe", moe_config=wrong)), "run.yaml")
    with pytest.raises(ValueError, match=f"moe_config.{key}"): PeerMLAConfig(memory_kind="moe", moe_config=wrong)
    config_from_dict(dict(model_config=dict(moe_config=wrong)))                        # nobody asks them where no layer is one


# ---- UltraMem ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_one_score_per_side_is_the_exact_product(seed):
    "All n² products in float64; with two scores it is exact where every key is kept"
    g = torch.Generator().manual_seed(seed)
    s, t = (torch.rand(20, 3, n, 1, generator=g, dtype=torch.float64) for n in (37, 23))
    core = torch.rand(3, 1, 1, generator=g, dtype=torch.float64) + .1
    every = (s @ core @ t.mT).flatten(-2).topk(9, -1)
    best, index = tucker_top_k(s, t, core, 9)
    assert torch.equal(index, every[1]) and torch.allclose(best, every[0], rtol=1e-12)
    s, t, core = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((20, 3, 5, 2), (20, 3, 4, 2), (3, 2, 2)))
    assert torch.equal(tucker_top_k(s, t, core, 5)[1], (s @ core @ t.mT).flatten(-2).topk(5, -1)[1])


@pytest.mark.parametrize("peer, kinds", [(dict(), dict()), (dict(shared_keys=True, num_experts_per_tok=12, value_dim=20, score_rank=4), dict(tie_word_embeddings=True))])
def test_ultramem_costs_what_is_counted(peer, kinds):
    "torch's counter sees all but the rows that are read, which the formula adds"
    options = {**SIZES, "peer_config": PEER | peer, "mla_config": MLA, "peer_start_layer": 1, "memory_kind": "ultramem", **kinds}
    with torch.device("meta"): model = PeerMLAForCausalLM(PeerMLAConfig(**options))
    count, rows = count_parameters(options, 32), layer_rows(options, 32)
    assert count.total == sum(p.numel() for p in model.parameters()) == sum(row["total"] for row in rows)
    assert (count.active, count.flops_per_token) == (sum(row["active"] for row in rows), sum(row["flops"] for row in rows))
    assert count.active == count.total - count.memory_tables + count.active_memory - (0 if kinds else 96*48)
    model = build(implementation="eager", **{key: value for key, value in options.items() if key not in SIZES})
    with FlopCounterMode(display=False) as counter: model(torch.zeros(1, 32, dtype=torch.long))
    assert counter.get_total_flops() == 32*(count.flops_per_token - 2*count.active_memory)


def test_ultramem_begins_with_a_mean_score_of_one():
    "Built by transformers, which draws the weights anew"
    model = build(memory_kind="ultramem", hidden_size=96, num_hidden_layers=3, peer_config=PEER | dict(num_experts=1024, product_key_dim=[32, 32], query_dim=64))
    weights = []
    for layer in model.model.layers[1:]: layer.memory.reader = lambda layer, x, w, index: weights.append(w) or layer.read(x, w, index)
    model(torch.randint(2, 97, (4, 30), generator=torch.Generator().manual_seed(0)))
    assert all(abs(w.mean() - 1) < .1 for w in weights) and len(weights) == 2


@pytest.mark.slow
def test_ultramem_saves_generates_compiles_and_is_adapted(tmp_path, ids):
    from peft import LoraConfig, get_peft_model
    from peer_nb.lora_targets import aliases_of
    model = build(memory_kind="ultramem", initializer_range=.1)
    model.save_pretrained(tmp_path)
    again = PeerMLAForCausalLM.from_pretrained(tmp_path)
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values()): assert torch.equal(a, b), name
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
    models = {layout: build(memory_kind="ultramem", peer_config=PEER | dict(table_gradient=layout)).train() for layout in ("dense", "sparse")}
    models["compiled"] = copy.deepcopy(models["dense"])
    ways = {name: torch.compile(m, fullgraph=True, backend="aot_eager") if name == "compiled" else m for name, m in models.items()}
    for way in ways.values(): way(ids, labels=ids).loss.backward()
    torch._dynamo.reset()
    for name, p in models["dense"].named_parameters():
        for other in ("sparse", "compiled"): torch.testing.assert_close(models[other].get_parameter(name).grad.to_dense(), p.grad, atol=1e-6, rtol=1e-4, msg=f"{other} {name}")
    adapted = get_peft_model(build(memory_kind="ultramem"), LoraConfig(r=2, target_modules=aliases_of("peer_mla")["mlp"]))
    assert any("layers.1.mlp.up_proj.lora_A" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_usage_and_retrievals_of_ultramem(ids):
    model = build(memory_kind="ultramem").train()
    recorder = UsageRecorder(model, Config().model_config.peer_config.__class__(log_freq=1))
    recorder.before(1)
    model(ids)
    assert recorder.after(1)["model.layers.1.memory"]["tokens"] == 26
    with reading(model.eval()) as seen: model(ids)
    columns = retrieval_columns(seen[1], torch.ones_like(ids).bool())
    assert torch.equal(columns["score"], columns["weight"]) and len(columns["key"]) == 26*2*4 and "similarity_0" not in columns
    with pytest.raises(UserError, match="no sum over its sub-keys"): seen[1].similarities


@pytest.mark.parametrize("wrong, key", [(dict(product_key_dim=[4, 4, 4], query_dim=48), "product_key_dim: 3 dimensions"), (dict(query_dim=18), "query_dim: 18 doesn't divide"), (dict(kernel="triton"), "kernel: triton")])
def test_ultramem_that_contradicts_itself_is_refused(wrong, key):
    sizes = dict(num_experts=64, product_key_dim=[8, 8]) | wrong
    with pytest.raises(ConfigError, match=f"run.yaml: model_config.peer_config.{key}"): config_from_dict(dict(model_config=dict(memory_kind="ultramem", peer_config=sizes)), "run.yaml")
    with pytest.raises(ValueError, match=f"peer_config.{key}"): PeerMLAConfig(memory_kind="ultramem", peer_config=sizes)


# ---- Engram -----------------------------------------------------------------------------------------------------------

NGRAMS = dict(layers=[0, 1], num_heads=2, table_size=50, embed_dim=16)


@pytest.fixture(scope="module")
def bytes_tokenizer(): return load_tokenizer(DatasetConfig(tokenizer_name="bytes"))


def engram(tokenizer, seed=0, ngrams=NGRAMS, **changes):
    "A model that knows its tokens, with a convolution that is not zero"
    model = build(seed, engram_config=ngrams, **dict(vocab_size=300, initializer_range=.3) | changes)
    model.get_decoder().take_tokens(tokenizer)
    for layer in model.model.layers: torch.nn.init.normal_(layer.engram.conv)
    return model


def largest(a, b): return (a - b).abs().max().item()


@pytest.mark.parametrize("ordinal, layer", [(0, 1), (1, 3)])
def test_ngrams_are_transformers_near_twin(ordinal, layer):
    """Lengths of tables, addresses, output and gradients. Switched off: their several streams (hc_count), the splitmix multipliers (theirs are loaded), norms that
    store weight - 1, texts that begin anew at an end-of-text token (none occurs), tokens as they come (every token is canonical here)"""
    twin = pytest.importorskip("transformers.models.qwen4_exp.modeling_qwen4_exp").Qwen4ExpTextPLELayer
    torch.manual_seed(ordinal)
    theirs = twin(SimpleNamespace(vocab_size=60, hidden_size=12, hc_count=1, ngram_size=3, heads_per_ngram=2, ngram_vocab_size_base=31, ple_embed_dim=16, ple_conv_kernel_size=4,
                                  eos_token_id=59, seed=5, rms_norm_eps=1e-5, make_ngram_vocab_size_divisible_by=1), layer, ordinal)
    for p in theirs.parameters(): torch.nn.init.normal_(p, std=.5)
    ours, state = Engram(12, EngramConfig(layers=[1, 3], num_heads=2, table_size=31, embed_dim=16), layer), theirs.state_dict()
    assert ours.primes.tolist() == theirs.ple_embedding.head_vocab_sizes and ours.offsets.tolist() == theirs.ple_embedding.head_offsets
    norms = {f"{name}.weight": 1 + state[f"{name}.weight"] for name in ("norm_key", "norm_query", "norm_conv")}
    kept = {f"{name}.weight": state[f"{name}.weight"] for name in ("key_proj", "value_proj")}
    ours.load_state_dict(dict(primes=ours.primes, offsets=ours.offsets, multipliers=theirs.ple_embedding.layer_multipliers, conv=state["conv1d.weight"][:, 0],
                              **{"table.weight": state["ple_embedding.ngram_embedding.weight"]}, **norms, **kept), strict=True)
    tokens, h, reach = torch.randint(0, 59, (2, 15)), torch.randn(2, 15, 12, requires_grad=True), torch.arange(15)[None]
    want, got = theirs(h, tokens, None), ours(h, ours.addresses(tokens, 59, reach), reach)
    assert largest(got, want) <= 1e-6
    for a, b in zip(*[torch.autograd.grad(out.sin().sum(), (h, table)) for out, table in ((want, theirs.ple_embedding.ngram_embedding.weight), (got, ours.table.weight))]):
        assert largest(a, b) <= 2e-6


def test_ngrams_decode_as_the_whole_text(bytes_tokenizer, ids):
    "In pieces, greedily, by beams, with speculation that is taken back, with padding, and document by document"
    model = engram(bytes_tokenizer)
    whole, cache = model(ids).logits, DynamicCache(config=model.config)
    pieces = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 1, 3, 4], 1)]
    assert largest(torch.cat(pieces, 1), whole) < 5e-5
    held = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers)
    assert held == cache_numbers({**SIZES, "mla_config": MLA, "engram_config": NGRAMS})[0]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    for more in (dict(), dict(num_beams=3)): assert torch.equal(model.generate(ids, **options, **more), model.generate(ids, use_cache=False, **options, **more))
    assert torch.equal(model.generate(ids[:1], **options, prompt_lookup_num_tokens=3), model.generate(ids[:1], **options))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for positions in (None, (mask.cumsum(1) - 1).clamp(min=0)):
        assert largest(model(ids, attention_mask=mask, position_ids=positions).logits[0, 4:], model(ids[:1, 4:]).logits[0]) < 5e-5
    borders, documents = torch.tensor([0, 5, 6, 13], dtype=torch.int32), ids[:1].split([5, 1, 7], 1)
    assert largest(model(ids[:1], cu_seqlens=borders).logits, torch.cat([model(d).logits for d in documents], 1)) < 5e-5
    with pytest.raises(ValueError, match="use a DynamicCache"): model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))


def test_ngrams_cost_what_is_counted():
    options = {**SIZES, "peer_config": PEER, "mla_config": MLA, "peer_start_layer": 1, "memory_kind": "pkm", "engram_config": dict(NGRAMS, layers=[1])}
    with torch.device("meta"): model = PeerMLAForCausalLM(PeerMLAConfig(**options))
    count, rows = count_parameters(options, 32), layer_rows(options, 32)
    assert count.total == sum(p.numel() for p in model.parameters()) == sum(row["total"] for row in rows)
    assert (count.active, count.flops_per_token) == (sum(row["active"] for row in rows), sum(row["flops"] for row in rows))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer = Engram(48, EngramConfig(**options["engram_config"]), 1)
        layer(torch.randn(1, 32, 48), torch.zeros(1, 32, 4, dtype=torch.long), torch.arange(32)[None])
    own = count.flops_per_token - count_parameters({**options, "engram_config": {}}, 32).flops_per_token
    assert counter.get_total_flops() == 32*(own - 2*4*48)                            # the convolution's taps are no matrix product


def test_ngrams_save_and_lie_where_they_are_asked_to(bytes_tokenizer, tmp_path, ids):
    model = engram(bytes_tokenizer)
    model.save_pretrained(tmp_path)
    again = PeerMLAForCausalLM.from_pretrained(tmp_path)
    for (name, a), b in zip(again.state_dict().items(), model.state_dict().values()): assert torch.equal(a, b), name
    host = engram(bytes_tokenizer, ngrams=NGRAMS | dict(table_device="cpu"))
    assert torch.equal(host(ids).logits, model(ids).logits)
    moved = copy.deepcopy(host).to(torch.bfloat16).model.layers[0].engram
    assert moved.table.weight.dtype == torch.bfloat16
    away = torch.nn.ModuleList([Engram(48, EngramConfig(**NGRAMS | dict(table_device=where)), 0) for where in ("cpu", "model")])._apply(lambda t: t.to("meta"))
    assert [m.table.weight.device.type for m in away] == ["cpu", "meta"] and away[0].conv.device.type == "meta"


@pytest.mark.slow
def test_ngrams_compile(bytes_tokenizer, ids):
    train, twin = engram(bytes_tokenizer).train(), engram(bytes_tokenizer).train()
    for way in (train, torch.compile(twin, fullgraph=True, backend="aot_eager")): way(ids, labels=ids).loss.backward()
    torch._dynamo.reset()
    for (name, p), q in zip(train.named_parameters(), twin.parameters()): torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_equal_words_are_one(bytes_tokenizer):
    numbers, pad = canonical_map(bytes_tokenizer, 300)
    a, upper = (numbers[bytes_tokenizer(text, add_special_tokens=False)["input_ids"][0]] for text in ("a", "A"))
    assert a == upper and len(set(numbers)) == 300 - 26 - 3 and pad == numbers[bytes_tokenizer.pad_token_id]     # capital letters; tab, new line and return are not a blank alone


def test_a_model_that_does_not_know_its_tokens_says_so(ids):
    model = build(engram_config=NGRAMS)
    with pytest.raises(ValueError, match="doesn't know which tokens are the same word"): model(ids)
    with pytest.raises(ValueError, match="give input_ids"): model(inputs_embeds=torch.randn(1, 3, 48))


@pytest.mark.parametrize("wrong, key", [(dict(layers=[12]), "layers: .12.: name each layer once"), (dict(table_size=1), "table_size: .*the first prime"), (dict(embed_dim=100), "embed_dim: 100 doesn't divide"),
                                        (dict(table_device="cuda:9"), "table_device: .*model"), (dict(ngram_size=1), "ngram_size")])
def test_ngrams_that_contradict_themselves_are_refused(wrong, key):
    with pytest.raises(ConfigError, match=f"run.yaml: model_config.engram_config.{key}"): config_from_dict(dict(model_config=dict(engram_config=wrong)), "run.yaml")
    with pytest.raises(ValueError, match=f"engram_config.{next(iter(wrong))}"): PeerMLAConfig(engram_config=wrong)


def test_a_base_with_ngrams_is_no_base_of_sparse_layer():
    base = apply_overrides(load_config("configs/demo.yaml"), {"model_config.engram_config.layers": [0]})
    with pytest.raises(UserError, match="engram_config.layers"): builtin_axes(base, ["sparse_layer"])


# ---- the axis ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["configs/config.yaml", "configs/demo.yaml", "configs/small.yaml"])
def test_arms_of_sparse_layer_weigh_and_cost_as_much(file):
    "Parameters of models without numbers; every arm can be had, and is one percent from the base at most"
    base = load_config(file)
    levels, left_out = sparse_layer_levels(base)
    assert set(levels) | set(left_out) == set(SPARSE_KINDS) and {"dense", "moe", "pkm", "peer", "ultramem", "engram"} <= set(levels) and not levels["peer"]
    sizes = {}
    for kind, overrides in levels.items():
        with torch.device("meta"): model = PeerMLAForCausalLM(PeerMLAConfig(**to_dict(apply_overrides(base, overrides))["model_config"]))
        sizes[kind] = sum(p.numel() for p in model.parameters())
        assert residual_of(apply_overrides(base, overrides).model_config, base.model_config).worst(kind == "dense") < .01
    assert all(abs(size/sizes["peer"] - 1) < .01 for kind, size in sizes.items() if kind != "dense")


def test_an_arm_that_misses_is_left_out_unless_that_is_asked_for():
    base = load_config("configs/demo.yaml")
    strict, why = sparse_layer_levels(base, 1e-4)
    assert "moe" in why and "--residual" in why["moe"] and "moe" not in strict and "dense" in strict
    axes, left_out = builtin_axes(base, ["sparse_layer"], residual=1e-4)
    assert "sparse_layer: moe" in left_out and set(axes["sparse_layer"]) == set(strict)
    assert "moe" in builtin_axes(base, ["sparse_layer"])[0]["sparse_layer"] and set(builtin_axes(base)[0]) == set(BUILTIN_AXES)
    rows = {row["sparse_layer"]: row for row in residual_rows(base, sparse_layer_levels(base)[0])}
    assert rows["dense"]["parameters"] == "not comparable" and rows["peer"]["parameters"] == "+0.00%"


def test_a_shared_memory_is_no_base_of_sparse_layer():
    base = apply_overrides(load_config("configs/demo.yaml"), {"model_config.share_memory": True})
    with pytest.raises(UserError, match="share_memory: true"): builtin_axes(base, ["sparse_layer"])
    with pytest.raises(UserError, match="did you mean 'sparse_layer'"): builtin_axes(base, ["sparse_layers"])


def test_the_study_of_sparse_layers_is_what_its_base_solves_to():
    study = load_study("configs/studies/sparse_layers.yaml")
    assert study.axes["sparse_layer"] == sparse_layer_levels(load_config(study.base_config))[0]


@pytest.mark.slow
def test_the_benchmark_runs_every_branch():
    done = subprocess.run([sys.executable, "benchmarks/sparse_layers_cpu.py", "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0 and "moe beside transformers eager" in done.stdout, done.stderr


# ---- identity ---------------------------------------------------------------------------------------------------------

def test_configurations_of_earlier_versions_keep_their_fingerprints():
    "As the version before these keys wrote them into checkpoints and plans"
    assert config_hash(Config()) == "a00009cad8a071b346e495539de1d5e13a237c8294bf417592313e3b77970b1e"
    assert section_hashes(Config())["model_config"] == "7a8cfc1c11cf7c7c816838f3f5898f64347d7db4a46b443239cbb3ad140930a1"
    other = apply_overrides(Config(), {"model_config.attention_kind": "mha"})
    assert config_hash(other) != config_hash(Config()) and section_hashes(other)["model_config"] != section_hashes(Config())["model_config"]
