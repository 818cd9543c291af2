"Memory layers and the model among torch.autograd, torch.func, peft, accelerate and transformers: what others do with a model"
import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from peer_nb.models.causal_lm import ChunkedCrossEntropy, PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.models.peer import MEMORY_KINDS
from peer_nb.training.checkpoints import load_weights, tell_generation

torch.set_num_threads(1)
MLA = dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8)
MEMORY = dict(num_experts=64, num_experts_per_tok=4, num_heads=2, product_key_dim=[8, 8], query_dim=16, query_norm="layer")
TINY = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=97, max_position_embeddings=64,
            peer_start_layer=1, peer_config=MEMORY, mla_config=MLA, initializer_range=.2)


def build(seed=0, peer=None, **changes):
    torch.manual_seed(seed)
    return PeerMLAForCausalLM(PeerMLAConfig(**TINY | dict(peer_config=MEMORY | (peer or {})) | changes)).eval()


def layer(kind, **options):
    torch.manual_seed(0)
    made = MEMORY_KINDS[kind](12, **dict(MEMORY, query_dim=8) | options)
    with torch.no_grad(): [getattr(made, name).weight.normal_() for name in made.table_names]
    return made


def largest(a, b): return (a - b).abs().max().item()


@pytest.fixture
def ids(): return torch.randint(2, 97, (2, 13), generator=torch.Generator().manual_seed(3))


# derivatives of derivatives, and torch.func

@pytest.mark.parametrize("options", [{}, dict(table_gradient="sparse"), dict(score="sigmoid", query_norm="batch", shared_keys=True)])
@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_second_derivatives_are_the_plain_operations(kind, options):
    "float32, where the search and the sparse products run, against torch's own operations in the same layer"
    made, x, found = layer(kind, **options), torch.randn(40, 12), []
    weights = list(made.parameters())
    for plain in (False, True):
        hooks = [getattr(made, name).register_forward_hook(lambda *a: None) for name in made.table_names] if plain else []
        if plain: made.retrieve = lambda query: plain_retrieval(made, query)
        grads = torch.autograd.grad(made(x).sin().sum(), weights, create_graph=True)
        found.append(torch.autograd.grad(sum(g.to_dense().square().sum() for g in grads), weights))
        for hook in hooks: hook.remove()
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def plain_retrieval(made, query):
    from peer_nb.models.product_keys import product_top_k
    return product_top_k(made.similarities(query), made.top_k)


def test_second_derivatives_of_the_loss_in_chunks():
    leaves = [torch.randn(9, 5).requires_grad_(), torch.randn(20, 5).requires_grad_()]
    labels, found = torch.tensor([3, -100, 5, 1, 19, 0, 7, -100, 2]), []
    for f in (lambda h, w: ChunkedCrossEntropy.apply(h, w, labels, 4, True), lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, labels, reduction="sum")):
        grads = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 4])
def test_torch_func_gives_the_gradients_of_backward(chunk, ids):
    model = build(loss_chunk_size=chunk)
    weights = {n: p.detach() for n, p in model.named_parameters()}

    def loss(weights, row): return torch.func.functional_call(model, weights, (row,), dict(labels=row, use_cache=False)).loss

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids[:, None])
    for i, row in enumerate(ids):
        model.zero_grad()
        model(row[None], labels=row[None]).loss.backward()
        for n, p in model.named_parameters(): assert largest(each[n][i], p.grad) <= 1e-4 * max(1, p.grad.abs().max()), n


def test_forward_mode_is_a_difference_quotient():
    made, x, direction = layer("peer").double(), torch.randn(9, 12).double(), torch.randn(9, 12).double()
    _, slope = torch.func.jvp(made, (x,), (direction,))
    assert largest(slope, (made(x + 1e-6 * direction) - made(x - 1e-6 * direction)) / 2e-6) < 1e-5


# tables behind something

@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_hooks_on_tables_take_effect(kind):
    made, x = layer(kind), torch.randn(9, 12)
    last, calls = getattr(made, made.table_names[-1]), []
    before = made(x)
    for register in (last.register_forward_pre_hook, last.register_full_backward_hook): register(lambda *a: calls.append(1))
    torch.testing.assert_close(made(x.requires_grad_()), before)
    made(x).sum().backward()
    assert len(calls) == 3
    last.register_forward_hook(lambda module, args, rows: 0 * rows)
    assert made(x).abs().max() == 0


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("kind", MEMORY_KINDS)
def test_tables_off_the_device(kind, share, ids):
    model = build(memory_kind=kind, share_memory=share)
    want = model(ids).logits
    assert largest(cpu_offload(copy.deepcopy(model), execution_device="cpu")(ids).logits, want) < 1e-5


# one table for all layers

def test_a_shared_table_stays_one_in_peft(ids, tmp_path):
    wrapped = get_peft_model(build(share_memory=True), LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["memory"], task_type="CAUSAL_LM"))
    first, second = (block.memory.modules_to_save["default"] for block in wrapped.base_model.model.model.layers[1:])
    before = first.expert_up.weight.detach().clone()
    wrapped.train()(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=.5).step()
    assert second.expert_up.weight is first.expert_up.weight and largest(first.expert_up.weight, before) > 0
    want = wrapped.eval()(ids).logits
    wrapped.save_pretrained(tmp_path)
    assert largest(PeftModel.from_pretrained(build(share_memory=True), tmp_path).eval()(ids).logits, want) < 1e-5
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path/"merged")
    assert largest(PeerMLAForCausalLM.from_pretrained(tmp_path/"merged")(ids).logits, want) < 1e-4


def test_only_the_owner_is_trained_in_full(ids):
    "A layer that borrows reads what stands in its owner's place, not what stood there"
    wrapped = get_peft_model(build(share_memory=True), LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["layers.1.memory"]))
    owner, borrower = (block.memory for block in wrapped.base_model.model.model.layers[1:])
    assert borrower.expert_up.weight is owner.modules_to_save["default"].expert_up.weight


def test_layers_copied_one_by_one_share_again(ids):
    model, other = build(share_memory=True), build(seed=1, share_memory=True)
    other.load_state_dict(model.state_dict())
    other.model.layers = torch.nn.ModuleList(copy.deepcopy(block) for block in model.model.layers)
    torch.nn.init.normal_(other.model.layers[1].memory.expert_up.weight)
    fresh = build(seed=2, share_memory=True)
    fresh.load_state_dict(other.state_dict())
    assert largest(fresh(ids).logits, other(ids).logits) == 0 and largest(model(ids).logits, other(ids).logits) > 0
    assert other.model.layers[2].memory.expert_up is other.model.layers[1].memory.expert_up
    other.model.layers = other.model.layers[2:]
    with pytest.raises(ValueError, match="not in this model any more"): other(ids)


# arguments and settings

@pytest.mark.parametrize("given", ["head_mask", "atention_mask", "output_atentions"])
def test_unknown_arguments_are_refused(given, ids):
    for part in (build(), build().model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{given}'"): part(ids, **{given: torch.ones(4)})


@pytest.mark.parametrize("given", [dict(rope_theta=5e5), dict(rope_scaling=dict(rope_type="linear", factor=4.)), dict(rope_parameters=dict(rope_theta=5e5)),
                                   dict(kv_lora_rank=8), dict(num_heads=4), dict(attention_dropout=.1), dict(hidden_act="relu"), dict(colour=3), dict(hiden_size=4)])
def test_settings_without_effect_are_refused(given):
    with pytest.raises(ValueError, match=f"has no key '{next(iter(given))}'"): PeerMLAConfig(**TINY | given)


def test_a_changed_configuration_is_checked_and_sections_are_merged(tmp_path, ids):
    model = build()
    model.save_pretrained(tmp_path)
    for given, message in ((dict(memory_layers=[7]), "from 0 to 2"), (dict(dropout=7.), "below 1"), (dict(peer_config=dict(num_expert=3)), "num_experts"),
                           (dict(peer_config=dict(num_experts=63)), "num_experts=63"), (dict(rope_theta=5e5), "mla_config")):
        with pytest.raises(ValueError, match=message): AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, peer_config=dict(usage_threshold=4.), mla_config=dict(rope_theta=5e5))
    assert loaded.config.peer_config == model.config.peer_config | dict(usage_threshold=4.)
    assert loaded.config.mla_config == model.config.mla_config | dict(rope_theta=5e5) and largest(loaded(ids).logits, model(ids).logits) > 1e-3
    model.config.memory_layers = [7]
    with pytest.raises(ValueError, match="from 0 to 2"): PeerMLAForCausalLM(model.config)


# as transformers' models

def test_packed_rows_are_the_documents(ids):
    model, documents = build(), [ids[i % 2, :n].tolist() for i, n in enumerate((13, 9, 1, 13, 12, 13, 11))]     # 72 tokens, 64 positions
    losses = [model(torch.tensor([d]), labels=torch.tensor([d]), num_items_in_batch=1).loss for d in documents]
    for options in (dict(), dict(return_flash_attn_kwargs=True), dict(return_seq_idx=True)):
        packed = DataCollatorWithFlattening(**options)([dict(input_ids=d, labels=d) for d in documents])
        assert abs(model(**packed, use_cache=False).loss * 65 - sum(losses)) < 1e-3
    with pytest.raises(ValueError, match="position_ids go up to 69"): model(ids[:, :1].repeat(1, 70), position_ids=torch.arange(70)[None])


def test_tuples_early_exit_and_counts(ids):
    model = build(share_memory=True)
    assert type(model(ids, return_dict=False)) is type(model.model(ids, return_dict=False)) is tuple
    tables = 2 * 64 * 32
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - 97*32
    for p in model.model.parameters(): p.requires_grad_(False)
    assert model.num_parameters(only_trainable=True, exclude_embeddings=True) == 97*32 and tables < model.num_parameters()
    shallow = model.generate(ids[:1], max_new_tokens=6, do_sample=False, assistant_early_exit=1)
    assert torch.equal(shallow, model.generate(ids[:1], max_new_tokens=6, do_sample=False))
    assert model.generate(ids[:1], max_new_tokens=51, do_sample=False, prompt_lookup_num_tokens=5).shape[1] <= 64


def test_a_static_cache_under_autocast(ids):
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, **o).shape for o in (dict(), dict(cache_implementation="static"))]
    assert found[0] == found[1]


def test_the_name_of_the_sub_keys(ids, tmp_path):
    "In the model a name that parametrizations and adapters take, in files the name that they have always had"
    model = build()
    model.save_pretrained(tmp_path)
    old = {name.replace("sub_keys", "keys"): value for name, value in model.state_dict().items()}
    fresh = build(seed=1)
    fresh.load_state_dict(old)
    loaded, again = build(seed=2), AutoModelForCausalLM.from_pretrained(tmp_path)
    load_weights(loaded, tmp_path)
    for other in (fresh, loaded, again): assert largest(other(ids).logits, model(ids).logits) < 1e-5
    from safetensors import safe_open
    with safe_open(tmp_path/"model.safetensors", "pt") as file: assert "model.layers.1.memory.keys" in file.keys()
    wrapped = get_peft_model(build(), LoraConfig(r=2, init_lora_weights=False, target_modules=[], target_parameters=["memory.sub_keys"]))
    wrapped(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in wrapped.parameters() if p.requires_grad]
    assert grads and all(g is not None and g.abs().max() > 0 for g in grads)

    class Same(torch.nn.Module):
        def forward(self, x): return x
    parametrize.register_parametrization(fresh.model.layers[1].memory, "sub_keys", Same())
    assert largest(fresh(ids).logits, model(ids).logits) < 1e-5


def test_what_generation_needs_is_told():
    class Tokens: bos_token_id, eos_token_id, pad_token_id = 1, 2, 3
    model = build()
    tell_generation(model, Tokens)
    assert (model.config.eos_token_id, model.generation_config.pad_token_id, model.generation_config.max_length) == (2, 3, 64)


def test_code_in_a_checkpoint_is_refused_with_a_reason():
    for kind in (PeerMLAConfig, PeerMLAForCausalLM):
        with pytest.raises(NotImplementedError, match="`import peer_nb` there"): kind.register_for_auto_class("AutoModelForCausalLM")
