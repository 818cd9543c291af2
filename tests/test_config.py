"Every key has an effect or is on the list; every mistake in a file is a ConfigError that names file and key"
import ast
import copy
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import peer_nb
from peer_nb import config
from peer_nb.config import (Config, ConfigError, DatasetEntry, apply_overrides, config_from_dict, config_hash, diff_configs, flatten,
                            known_keys, load_config, load_data_mixes, save_config, to_dict, validate)
from peer_nb.study.study import load_study

ROOT = Path(__file__).parents[1]
PACKAGE = Path(peer_nb.__file__).parent
LEAVES = sorted(key for key, known in known_keys().items() if known.leaf)
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

# ---- what each key changes --------------------------------------------------------------------------------------------

MODEL, OPTIONS, ROUTER, LOOP, OPTIM, CORPORA = "models/causal_lm.py", "models/options.py", "models/product_keys.py", "training/loop.py", "training/optim.py", "data/corpora.py"
PACKING, PERPLEXITY, BENCHMARKS, TRACKING = "data/packing.py", "evaluation/perplexity.py", "evaluation/benchmarks.py", "training/tracking.py"
ADAPTERS, MOE, ULTRAMEM, ENGRAM = "training/adapters.py", "models/moe.py", "models/ultramem.py", "models/engram.py"
TRANSLATOR, BRIDGE_ITEMS, BRIDGE_LOSSES, BRIDGE, BRIDGE_TRAINING = (f"bridge/{name}.py" for name in ("translator", "items", "losses", "bridge", "training"))
HF = "transformers"   # read by the base class of the model; seen by test_every_model_key_changes_the_model

ENTRY = {   # of each of the three lists of sources
    "name": (PERPLEXITY, "the name a score is reported under"),
    "path": (CORPORA, "which text is read"),
    "subset": (CORPORA, "which configuration of a hub set is read"),
    "format": (CORPORA, "how local files are parsed"),
    "split": (CORPORA, "which split of a hub set is read; refused where there is only one"),
    "streaming": (CORPORA, "whether a hub set is downloaded before"),
    "weight": (PACKING, "the share of rows from this source (in the list that is trained on)"),
    "text_field": (CORPORA, "which field of a record is the text"),
    "text_template": (CORPORA, "how the text is made of several fields"),
    "mask": (PACKING, "which tokens are targets"),
    "task": (CORPORA, "which generator makes the rows"),
    "task_arguments": (CORPORA, "which rows it makes"),
}
OBSERVABLES = {   # dotted key: (file of the package that reads it, what can be seen to change)
    "model_config.hidden_size": (MODEL, "shape of every weight"),
    "model_config.num_hidden_layers": (MODEL, "number of layers"),
    "model_config.num_attention_heads": (MODEL, "shape of the attention's projections"),
    "model_config.intermediate_size": (MODEL, "shape of a dense feed-forward layer"),
    "model_config.vocab_size": (MODEL, "rows of the embedding"),
    "model_config.max_position_embeddings": (MODEL, "the longest sequence that is not refused"),
    "model_config.initializer_range": (HF, "spread of the initial weights"),
    "model_config.layer_norm_eps": (MODEL, "logits"),
    "model_config.use_peer": (MODEL, "whether a layer holds a memory"),
    "model_config.peer_start_layer": (MODEL, "which layers hold a memory"),
    "model_config.peer_config.num_experts": (MODEL, "rows of the expert tables"),
    "model_config.peer_config.num_experts_per_tok": (MODEL, "experts that a token activates; logits"),
    "model_config.peer_config.num_heads": (ROUTER, "width of the query projection"),
    "model_config.peer_config.expert_hidden_size": ("models/peer.py", "width of the expert tables"),
    "model_config.peer_config.product_key_dim": (MODEL, "shape of the keys"),
    "model_config.peer_config.query_dim": (MODEL, "width of the query projection"),
    "model_config.peer_config.batch_norm_query": (OPTIONS, "whether the query is normalised"),
    "model_config.peer_config.activation": ("models/peer.py", "logits"),
    "model_config.peer_config.score": (ROUTER, "expert weights; logits"),
    "model_config.peer_config.query_norm": (ROUTER, "kind of the query's normalisation"),
    "model_config.peer_config.table_gradient": ("models/peer.py", "layout of the tables' gradients"),
    "model_config.peer_config.table_dtype": ("models/peer.py", "type of the tables' numbers; logits"),
    "model_config.peer_config.kernel": ("models/peer.py", "which operations find and read rows; what is refused"),
    "model_config.peer_config.shared_keys": (OPTIONS, "first dimension of the keys"),
    "model_config.peer_config.score_rank": (ULTRAMEM, "shape of the cores"),
    "model_config.peer_config.value_dim": (ULTRAMEM, "width of the tables"),
    "model_config.mla_config.q_lora_rank": ("models/mla.py", "shape of the query projection"),
    "model_config.mla_config.kv_lora_rank": ("models/mla.py", "shape of the latent's projections; size of the cache"),
    "model_config.mla_config.qk_rope_head_dim": ("models/mla.py", "shape of the query projection"),
    "model_config.mla_config.v_head_dim": ("models/mla.py", "shape of the output projection"),
    "model_config.mla_config.qk_nope_head_dim": ("models/mla.py", "shape of the query projection"),
    "model_config.mla_config.rope_theta": (MODEL, "logits at later positions"),
    "model_config.mla_config.rope_scaling.rope_type": ("models/mla.py", "logits at later positions"),
    "model_config.mla_config.rope_scaling.factor": ("models/mla.py", "logits at later positions"),
    "model_config.mla_config.rope_scaling.original_max_position_embeddings": ("models/mla.py", "logits at later positions"),
    "model_config.mla_config.rope_scaling.beta_fast": (HF, "logits at later positions, under yarn"),
    "model_config.mla_config.rope_scaling.beta_slow": (HF, "logits at later positions, under yarn"),
    "model_config.mla_config.rope_scaling.mscale": (HF, "logits, under yarn"),
    "model_config.mla_config.rope_scaling.mscale_all_dim": ("models/mla.py", "logits, under yarn"),
    "model_config.memory_kind": (MODEL, "tables of the memory layers"),
    "model_config.memory_layers": (MODEL, "which layers hold a memory"),
    "model_config.engram_config.layers": (MODEL, "which layers look n-grams up"),
    "model_config.engram_config.ngram_size": (ENGRAM, "rows of the table; logits"),
    "model_config.engram_config.num_heads": (ENGRAM, "shape of the table"),
    "model_config.engram_config.table_size": (OPTIONS, "rows of the table"),
    "model_config.engram_config.embed_dim": (ENGRAM, "width of the table's rows"),
    "model_config.engram_config.kernel_size": (ENGRAM, "shape of the convolution"),
    "model_config.engram_config.seed": (ENGRAM, "addresses; logits"),
    "model_config.engram_config.table_device": (ENGRAM, "where the table lies"),
    "model_config.moe_config.n_routed_experts": (MOE, "shape of the experts' stacks"),
    "model_config.moe_config.num_experts_per_tok": (MOE, "experts of a token; logits"),
    "model_config.moe_config.n_shared_experts": (MOE, "shape of the shared experts"),
    "model_config.moe_config.moe_intermediate_size": (MOE, "shape of the experts' stacks"),
    "model_config.moe_config.n_group": (MOE, "which experts a token may choose; logits"),
    "model_config.moe_config.topk_group": (MOE, "which experts a token may choose; logits"),
    "model_config.moe_config.scoring": (MOE, "scores; logits"),
    "model_config.moe_config.norm_topk_prob": (MOE, "weights of the experts; logits"),
    "model_config.moe_config.routed_scaling_factor": (MOE, "weights of the experts; logits"),
    "model_config.moe_config.balance": (MOE, "gradients of the router, or its bias after a step"),
    "model_config.moe_config.balance_coefficient": (MOE, "gradients of the router"),
    "model_config.moe_config.bias_update_rate": (MOE, "the router's bias after a step"),
    "model_config.moe_config.z_loss_coefficient": (MOE, "gradients of the router"),
    "model_config.attention_kind": (MODEL, "names and shapes of the attention's projections"),
    "model_config.num_key_value_heads": ("models/heads.py", "shape of the projections of keys and values; size of the cache"),
    "model_config.share_memory": (MODEL, "number of different tables"),
    "model_config.tie_word_embeddings": (HF, "whether the head has weights of its own"),
    "model_config.dropout": (MODEL, "logits in training"),
    "model_config.loss_chunk_size": (MODEL, "memory of a training step; logits come back or not"),
    "model_config.peer_config.log_expert_usage": (TRACKING, "whether usage.jsonl is written"),
    "model_config.peer_config.log_freq": (TRACKING, "steps of the lines of usage.jsonl"),
    "model_config.peer_config.usage_threshold": (TRACKING, "which experts usage.jsonl calls hot"),
    "model_config.pretrained": (LOOP, "the weights and the architecture that training begins with"),
    "train_config.output_dir": (LOOP, "where checkpoints and metrics are written"),
    "train_config.per_device_train_batch_size": (PACKING, "rows of a batch"),
    "train_config.per_device_eval_batch_size": (LOOP, "rows of a forward pass of an evaluation during training"),
    "train_config.gradient_accumulation_steps": (LOOP, "batches of a step"),
    "train_config.learning_rate": (OPTIM, "the optimiser's peak learning rate"),
    "train_config.weight_decay": (OPTIM, "decay of the matrices' group"),
    "train_config.adam_beta1": (OPTIM, "the optimiser's betas"),
    "train_config.adam_beta2": (OPTIM, "the optimiser's betas"),
    "train_config.adam_epsilon": (OPTIM, "the optimiser's eps"),
    "train_config.max_grad_norm": (OPTIM, "length of the gradient that is applied"),
    "train_config.table_learning_rate": (OPTIM, "learning rate of the tables' group"),
    "train_config.table_weight_decay": (OPTIM, "decay of the tables' group"),
    "train_config.table_max_grad_norm": (OPTIM, "length of the tables' gradient"),
    "train_config.max_steps": (OPTIM, "number of steps"),
    "train_config.max_tokens": (OPTIM, "number of steps"),
    "train_config.num_train_epochs": (OPTIM, "number of steps"),
    "train_config.steps_per_epoch": (OPTIM, "number of steps"),
    "train_config.lr_scheduler_type": (OPTIM, "learning rate after the warm-up"),
    "train_config.warmup_ratio": (OPTIM, "learning rate of the first steps"),
    "train_config.log_level": (LOOP, "which lines the log has"),
    "train_config.logging_steps": (LOOP, "lines of metrics.jsonl"),
    "train_config.save_steps": (LOOP, "which checkpoints are written"),
    "train_config.save_total_limit": (LOOP, "which checkpoints stay"),
    "train_config.keep_optimizer_state": (LOOP, "what the checkpoints of a finished run hold beside weights"),
    "train_config.eval_steps": (LOOP, "held-out scores in metrics.jsonl"),
    "train_config.seed": ("training/steps.py", "initial weights and order of the data"),
    "train_config.fp16": (LOOP, "precision and loss scaling on a GPU; a line in the log on a CPU"),
    "train_config.bf16": (PERPLEXITY, "precision of the matrix products"),
    "train_config.fp8": (LOOP, "linear layers that round to float8"),
    "train_config.tf32": ("training/precision.py", "precision of matrix products on a GPU"),
    "train_config.compile": (LOOP, "whether the model is compiled"),
    "train_config.parallel": (LOOP, "how several processes share a run: what each holds, and which checkpoints it can continue"),
    "train_config.gradient_checkpointing": (LOOP, "memory of the backward pass"),
    "train_config.deterministic": ("training/precision.py", "torch's deterministic mode"),
    "train_config.freeze_layer_map": (LOOP, "which parameters get gradients"),
    "train_config.freeze_strict": (LOOP, "whether a pattern may match nothing"),
    "train_config.pretrained_layer_path": (LOOP, "where layers are taken from"),
    "train_config.pretrained_layer_step": (LOOP, "which checkpoint of that run"),
    "train_config.pretrained_layer_map": (LOOP, "which tensors are taken over, and where to"),
    "train_config.pretrained_layer_strict": (LOOP, "whether a mapped tensor may be left out"),
    "train_config.resume_from_checkpoint": (LOOP, "the step training starts at"),
    "dataset_config.tokenizer_name": (CORPORA, "tokens of a text"),
    "dataset_config.max_seq_length": (PACKING, "tokens of a row"),
    "dataset_config.num_workers": ("data/packing.py", "threads that make batches"),
    "dataset_config.packing": (PACKING, "whether documents of a batch see each other"),
    "dataset_config.heldout_fraction": (CORPORA, "which documents are held out"),
    "eval_config.eval_batch_size": (PERPLEXITY, "windows of a forward pass"),
    "eval_config.evals": (BENCHMARKS, "which benchmarks are scored"),
    "eval_config.evals_registry_path": (BENCHMARKS, "where evals that lm-eval does not have are looked for"),
    "eval_config.max_tokens": (PERPLEXITY, "tokens that are scored"),
    "lora_config.rank": (ADAPTERS, "shape of the adapters"),
    "lora_config.alpha": (ADAPTERS, "what the adapters add to a logit"),
    "lora_config.dropout": (ADAPTERS, "logits in training"),
    "lora_config.rslora": (ADAPTERS, "what the adapters add to a logit"),
    "lora_config.dora": (ADAPTERS, "whether magnitudes are trained"),
    "lora_config.init": (ADAPTERS, "adapters before the first step"),
    "lora_config.lora_plus_ratio": (OPTIM, "learning rate of the B matrices' group"),
    "lora_config.target_modules": (ADAPTERS, "which modules have adapters"),
    "lora_config.merge": (LOOP, "whether a merged model is written at the end"),
    "bridge_config.source.model": (BRIDGE, "whose hidden states are translated"),
    "bridge_config.source.layer": (BRIDGE, "which hidden states are translated"),
    "bridge_config.source.prompt": (BRIDGE_ITEMS, "what the source reads"),
    "bridge_config.target.model": (BRIDGE, "who answers"),
    "bridge_config.target.prompt": (BRIDGE_ITEMS, "what the prompted target reads"),
    "bridge_config.target.instruction": (BRIDGE_ITEMS, "what follows the soft tokens"),
    "bridge_config.swap": (BRIDGE, "which of the two models answers"),
    "bridge_config.translator.soft_tokens": (TRANSLATOR, "number of soft tokens"),
    "bridge_config.translator.depth": (TRANSLATOR, "number of blocks"),
    "bridge_config.translator.bottleneck": (TRANSLATOR, "width of the blocks"),
    "bridge_config.translator.heads": (TRANSLATOR, "soft tokens"),
    "bridge_config.translator.dropout": (TRANSLATOR, "soft tokens in training"),
    "bridge_config.translator.mode": (BRIDGE, "length of the target's input"),
    **{f"bridge_config.losses.{loss}.{key}": (BRIDGE_LOSSES, seen) for loss in ("nll", "kl", "info_nce", "prompt_alignment", "decode", "rope_projection")
       for key, seen in dict(weight="its part of the loss", warm_up="its part of the first losses", on="whether it is in the loss").items()},
    "bridge_config.data.task": (BRIDGE_ITEMS, "which items are asked"),
    "bridge_config.data.path": (BRIDGE_ITEMS, "where items are read from"),
    **{f"bridge_config.data.{name}_items": (BRIDGE_ITEMS, "number of items") for name in ("train", "validation", "test")},
    "bridge_config.data.held_out_pairs": (BRIDGE_ITEMS, "which pairs of operands only the test has"),
    "bridge_config.data.seed": (BRIDGE_ITEMS, "which items there are"),
    "bridge_config.data.cache_hidden": ("bridge/hidden.py", "whether hidden states are kept in files"),
    "bridge_config.evaluate.mode": (BRIDGE, "what follows the soft tokens"),
    "bridge_config.evaluate.max_new_tokens": (BRIDGE, "length of an answer"),
    "bridge_config.evaluate.stop": (BRIDGE, "where an answer ends"),
    "bridge_config.evaluate.repetition_penalty": (BRIDGE, "answers"),
    "bridge_config.evaluate.select_by": (BRIDGE_TRAINING, "the step that is kept"),
    "bridge_config.evaluate.patience": (BRIDGE_TRAINING, "the last step"),
    "bridge_config.evaluate.curve_items": (BRIDGE_TRAINING, "items of a point of the curve"),
    "eval_config.window": (PERPLEXITY, "tokens of context of a scored token"),
    "wandb_config.project": (TRACKING, "project at Weights & Biases"),
    "wandb_config.entity": (TRACKING, "user or team at Weights & Biases"),
    "wandb_config.name": (TRACKING, "name of the run at Weights & Biases"),
    "wandb_config.group": (TRACKING, "group of the run at Weights & Biases"),
    "wandb_config.levels": (TRACKING, "columns of the run at Weights & Biases"),
    "wandb_config.log_model": (TRACKING, "files that are uploaded with a checkpoint"),
    **{f"{place}.*.{name}": seen for place in ("dataset_config.datasets", "dataset_config.tokenizer_corpus", "eval_config.datasets")
       for name, seen in ENTRY.items()},
}


@cache
def names_read(file: Path) -> tuple[set[str], set[str]]:
    "Attributes that a module reads, and short texts in it (keys for getattr and dictionaries)"
    tree = list(ast.walk(ast.parse(file.read_text())))
    docs = {id(node.value) for node in tree if isinstance(node, ast.Expr)}
    texts = {word for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs for word in node.value.split()}
    return {node.attr for node in tree if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}, texts


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_has_an_effect(key):
    name = known_keys()[key].name
    assert key in OBSERVABLES, "name the observable that this key changes"
    reader, observable = OBSERVABLES[key]
    assert observable
    if reader == HF: return
    attributes, texts = names_read(PACKAGE/reader)
    assert name in attributes | texts, f"{reader} does not read {name}"


def test_the_lists_have_no_stale_keys():
    assert set(OBSERVABLES) <= set(LEAVES)


TINY = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64, max_position_embeddings=64, peer_start_layer=1,
    peer_config=dict(num_experts=64, num_experts_per_tok=4, num_heads=2, product_key_dim=[8, 8], query_dim=16),
    mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8))
CHANGES = {   # key below model_config: overrides that change it and what must change along
    "hidden_size": dict(hidden_size=48), "num_hidden_layers": dict(num_hidden_layers=3), "num_attention_heads": dict(num_attention_heads=4),
    "intermediate_size": dict(intermediate_size=96), "vocab_size": dict(vocab_size=80), "initializer_range": dict(initializer_range=0.05),
    "layer_norm_eps": dict(layer_norm_eps=0.1), "use_peer": dict(use_peer=False), "peer_start_layer": dict(peer_start_layer=0),
    "peer_config.num_experts": {"peer_config.num_experts": 128, "peer_config.product_key_dim": [8, 16]},
    "peer_config.product_key_dim": {"peer_config.product_key_dim": [4, 16]}, "peer_config.num_experts_per_tok": {"peer_config.num_experts_per_tok": 8},
    "peer_config.num_heads": {"peer_config.num_heads": 4}, "peer_config.expert_hidden_size": {"peer_config.expert_hidden_size": 2},
    "peer_config.query_dim": {"peer_config.query_dim": 32}, "peer_config.batch_norm_query": {"peer_config.batch_norm_query": False},
    "peer_config.activation": {"peer_config.activation": "relu"}, "peer_config.score": {"peer_config.score": "sigmoid"},
    "peer_config.query_norm": {"peer_config.query_norm": "batch"}, "peer_config.table_dtype": {"peer_config.table_dtype": "bfloat16"}, "peer_config.shared_keys": {"peer_config.shared_keys": True},
    "mla_config.q_lora_rank": {"mla_config.q_lora_rank": 16}, "mla_config.kv_lora_rank": {"mla_config.kv_lora_rank": 8},
    "mla_config.qk_rope_head_dim": {"mla_config.qk_rope_head_dim": 4}, "mla_config.v_head_dim": {"mla_config.v_head_dim": 8},
    "mla_config.qk_nope_head_dim": {"mla_config.qk_nope_head_dim": 16}, "mla_config.rope_theta": {"mla_config.rope_theta": 10.0},
    "memory_kind": dict(memory_kind="pkm"), "memory_layers": dict(memory_layers=[0, 1]), "share_memory": dict(share_memory=True, memory_layers=[0, 1]),
    "attention_kind": dict(attention_kind="mha"), "num_key_value_heads": dict(attention_kind="gqa", num_key_value_heads=1),
    "tie_word_embeddings": dict(tie_word_embeddings=True), "dropout": dict(dropout=0.5)}
YARN = dict(rope_type="yarn", factor=4, original_max_position_embeddings=256, mscale=1, mscale_all_dim=0.5)
SCALING = {name: {f"mla_config.rope_scaling.{name}": value} for name, value in dict(rope_type="linear", factor=8, original_max_position_embeddings=16,
    beta_fast=2, beta_slow=0.1, mscale=2, mscale_all_dim=1).items()}
ROUTING = dict(n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=2, moe_intermediate_size=8, norm_topk_prob=False, routed_scaling_factor=2.0)
EXPERTS = {f"moe_config.{name}": {f"moe_config.{name}": value} for name, value in ROUTING.items()}   # of a model with experts
EXPERTS |= dict.fromkeys(("moe_config.n_group", "moe_config.topk_group"), {"moe_config.n_group": 4, "moe_config.topk_group": 2})
EXPERTS |= {"moe_config.scoring": {"moe_config.scoring": "softmax", "moe_config.balance": "none"}}
CHANGES |= EXPERTS
ULTRA = {"peer_config.score_rank": {"peer_config.score_rank": 4}, "peer_config.value_dim": {"peer_config.value_dim": 6}}   # of a model with UltraMem
CHANGES |= ULTRA
NGRAMS = {f"engram_config.{name}": {f"engram_config.{name}": value} for name, value in
          dict(layers=[0, 1], ngram_size=4, num_heads=4, table_size=50, embed_dim=48, kernel_size=2, seed=1).items()}   # of a model with n-grams
CHANGES |= NGRAMS
CHANGES |= {f"mla_config.rope_scaling.{name}": change for name, change in SCALING.items()}   # of a model that is stretched
ELSEWHERE = {"max_position_embeddings", "pretrained", "engram_config.table_device", "loss_chunk_size", "peer_config.table_gradient", "peer_config.kernel",
             *(f"moe_config.{name}" for name in ("balance", "balance_coefficient", "bias_update_rate", "z_loss_coefficient")),
             *(f"peer_config.{name}" for name in ("log_expert_usage", "log_freq", "usage_threshold"))}   # seen in what the model refuses, in another model, in what it returns beside logits, in gradients, in the graph, and in usage.jsonl


def fingerprint(cfg: Config):
    "Names and shapes of a model's weights, and its logits in training mode"
    import torch
    from peer_nb.data.corpora import load_tokenizer
    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    torch.manual_seed(0)
    model = PeerMLAForCausalLM(PeerMLAConfig(**to_dict(cfg)["model_config"])).train()
    if cfg.model_config.engram_config.layers: model.get_decoder().take_tokens(load_tokenizer(config.DatasetConfig(tokenizer_name="bytes")))
    torch.manual_seed(1)
    logits = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    return [(name, tuple(weight.shape)) for name, weight in model.named_parameters()], logits


def test_every_model_key_changes_the_model():
    import torch
    keys = {key.removeprefix("model_config.") for key in LEAVES if key.startswith("model_config.")}
    assert keys == set(CHANGES) | ELSEWHERE
    base = config_from_dict(dict(model_config=TINY, dataset_config=dict(max_seq_length=64)))
    both = apply_overrides(base, {"model_config.memory_layers": [0, 1]})
    prints = {None: fingerprint(base), "share_memory": fingerprint(both)}
    torch.testing.assert_close(fingerprint(base)[1], prints[None][1])   # the same twice
    stretched = apply_overrides(base, {"model_config.mla_config.rope_scaling": YARN, "model_config.initializer_range": 0.2})
    prints |= dict.fromkeys([f"mla_config.rope_scaling.{name}" for name in SCALING], fingerprint(stretched))
    mixed = apply_overrides(base, {"model_config.memory_kind": "moe", "model_config.initializer_range": 0.2, "model_config.moe_config": dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=6)})
    ultra = apply_overrides(base, {"model_config.memory_kind": "ultramem"})
    prints |= dict.fromkeys(EXPERTS, fingerprint(mixed)) | dict.fromkeys(ULTRA, fingerprint(ultra))
    ngrams = apply_overrides(base, {"model_config.engram_config": dict(layers=[1], num_heads=2, table_size=30, embed_dim=24), "model_config.initializer_range": 0.2, "model_config.vocab_size": 300})
    prints |= dict.fromkeys(NGRAMS, fingerprint(ngrams))
    for key, change in CHANGES.items():
        changed = apply_overrides(stretched if "rope_scaling" in key else mixed if key in EXPERTS else ultra if key in ULTRA else ngrams if key in NGRAMS else base, {f"model_config.{name}": value for name, value in change.items()})
        shapes, logits = fingerprint(changed)
        old_shapes, old_logits = prints.get(key, prints[None])
        assert shapes != old_shapes or not torch.allclose(logits, old_logits, atol=1e-6), f"model_config.{key} changes nothing"


# ---- files ------------------------------------------------------------------------------------------------------------

def test_shipped_file_loads_round_trips_and_prints(tmp_path):
    cfg = load_config(ROOT/"configs"/"config.yaml")
    assert config_from_dict(to_dict(cfg)) == cfg
    assert load_config(save_config(cfg, tmp_path/"again.yaml")) == cfg
    stated = yaml.safe_load((ROOT/"configs"/"config.yaml").read_text())   # what PyYAML, by itself, sees in the file
    loaded = to_dict(cfg)
    def agree(there, here, key):
        if isinstance(there, dict):
            for name, value in there.items(): agree(value, here[name], f"{key}.{name}")
        elif isinstance(there, list) and there and isinstance(there[0], dict):
            for i, item in enumerate(there): agree(item, here[i], f"{key}.{i}")
        else: assert here == (float(there) if isinstance(here, float) else there), key
    agree(stated, loaded, "")
    table = cfg._repr_markdown_().splitlines()
    assert len(table) == len(flatten(cfg)) + 2
    assert "| `train_config.learning_rate` | 5e-05 | 5e-05 | peak learning rate |" in table
    assert not [row for row in table if row.endswith("|  |")]   # every key has a meaning


def test_every_key_is_explained():
    assert [key for key, known in known_keys().items() if not config.field_meanings(known.section).get(known.name)] == []


def test_shipped_mixes():
    mixes = load_data_mixes(ROOT/"configs"/"datasets.yaml")
    assert {"high_quality_mix", "science_mix"} <= set(mixes)
    assert mixes["high_quality_mix"].datasets[0].subset == "en" and mixes["high_quality_mix"].key == "high_quality_mix"
    paths = [entry.path for mix in mixes.values() for entry in mix.datasets]
    assert not [path for path in paths if path.startswith("/")], "a placeholder that no machine has"


def test_imports_nothing_heavy():
    code = "import peer_nb.config, peer_nb.cli, sys; print(*{m.split('.')[0] for m in sys.modules})"
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "numpy", "pandas", "datasets", "fastcore", "IPython", "filelock"} & set(words)


# ---- every mistake is a ConfigError that names file and key --------------------------------------------------------------

ENTRIES = [dict(name="a", path="a.txt"), dict(name="b", path="b.txt")]
FULL = to_dict(config_from_dict(dict(model_config=dict(mla_config=dict(rope_scaling=YARN)), dataset_config=dict(datasets=ENTRIES, tokenizer_corpus=ENTRIES), eval_config=dict(datasets=ENTRIES), wandb_config={}, lora_config={}, bridge_config={})))


def parent_of(tree: dict, key: str):
    "The mapping in a tree that holds a leaf, and the leaf's path in it with indices"
    *steps, last = key.replace("*", "1").split(".")
    for step in steps: tree = tree[int(step) if step.isdigit() else step]
    return tree, last, ".".join([*steps, last])


def refused(tree: dict, key: str) -> ConfigError:
    "The error for a tree; nothing else may come"
    with pytest.raises(ConfigError) as info: config_from_dict(tree, "some file.yaml")
    assert (info.value.file, info.value.key) == ("some file.yaml", key)
    assert str(info.value).startswith(f"some file.yaml: {key}: ")
    return info.value


def test_full_tree_is_valid():
    assert to_dict(config_from_dict(copy.deepcopy(FULL))) == FULL
    assert {key for key, known in known_keys().items() if known.leaf} == {".".join("*" if s.isdigit() else s for s in key.split(".")) for key in flatten(config_from_dict(FULL))}


@quick
@given(st.sampled_from(LEAVES), st.data())
def test_any_misspelt_key(key, data):
    tree = copy.deepcopy(FULL)
    keys, name, path = parent_of(tree, key)
    place = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.characters(categories=["L", "N", "P", "Z"]))
    wrong = data.draw(st.sampled_from([name[:place] + name[place + 1:], name[:place] + letter + name[place:], name[:place] + letter + name[place + 1:], name.upper()]))
    assume(wrong not in keys)
    keys[wrong] = keys.pop(name)
    error = refused(tree, path[:-len(name)] + wrong)
    assert "unknown key; " in str(error)


@pytest.mark.parametrize("key", LEAVES)
def test_one_letter_missing_is_answered_with_the_key(key):
    tree = copy.deepcopy(FULL)
    keys, name, path = parent_of(tree, key)
    keys[name + "x"] = keys.pop(name)
    assert f"did you mean {name}?" in str(refused(tree, path + "x"))


def plain(kind) -> str:
    "What a leaf holds, in one word"
    text = config.describe(kind)
    if "a mapping" in text: return "mapping"
    for word in ("list", "whole", "even", "true or false"):
        if word in text: return {"even": "whole", "true or false": "bool"}.get(word, word)
    if "a number" in text: return "number"
    return "text" if "text" in text or "hub name" in text else "choice"


WRONG = {   # what a leaf holds -> values of another type
    "list": st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.dictionaries(st.text(), st.none(), min_size=1), st.lists(st.booleans() | st.floats(0.1, 0.9) | st.none(), min_size=1)),
    "whole": st.one_of(st.booleans(), st.floats().filter(lambda x: x != int(x) if math.isfinite(x) else True), st.text("abcxyz-+._ ", max_size=9), st.lists(st.integers()), st.dictionaries(st.text(), st.none()), st.sampled_from([2**63, 1e300, "1e400", "1e999999999", "0x10"])),
    "number": st.one_of(st.booleans(), st.sampled_from([math.nan, math.inf, -math.inf, "nan", "inf", "1e400", 10**400]), st.text("abcxyz-+_ ", max_size=9), st.lists(st.integers()), st.dictionaries(st.text(), st.none())),
    "bool": st.one_of(st.sampled_from([0, 1, "yes", "no", "true", "on", None, ""]), st.floats(), st.lists(st.booleans()), st.dictionaries(st.text(), st.none())),
    "text": st.one_of(st.booleans(), st.integers(), st.floats(), st.lists(st.text()), st.dictionaries(st.text(), st.none()), st.sampled_from(["", " ", "a\0b", "\ud800", b"bytes"])),
    "mapping": st.one_of(st.booleans(), st.integers(), st.floats(), st.sampled_from(["", " ", "a\0b", "\ud800", b"bytes", {1: {2}}, [math.nan]])),
    "choice": st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.text()), st.dictionaries(st.text(), st.none())),
}


@quick
@given(st.sampled_from(LEAVES), st.data())
def test_any_wrong_type(key, data):
    tree = copy.deepcopy(FULL)
    keys, name, path = parent_of(tree, key)
    kind = plain(known_keys()[key].kind)
    keys[name] = data.draw(WRONG[kind])
    with pytest.raises(ConfigError) as info: config_from_dict(tree, "some file.yaml")
    assert info.value.file == "some file.yaml" and (info.value.key == path or kind == "list" and info.value.key.startswith(path + "."))
    assert "is not allowed; allowed: " in str(info.value)


FROM_ONE = """rank window hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size max_position_embeddings num_experts num_experts_per_tok
    num_heads expert_hidden_size query_dim log_freq q_lora_rank kv_lora_rank qk_rope_head_dim v_head_dim qk_nope_head_dim per_device_train_batch_size
    per_device_eval_batch_size gradient_accumulation_steps max_steps max_tokens steps_per_epoch logging_steps save_steps save_total_limit eval_steps
    max_seq_length eval_batch_size original_max_position_embeddings loss_chunk_size soft_tokens depth bottleneck heads max_new_tokens patience curve_items
    train_items validation_items test_items num_key_value_heads
    n_routed_experts moe_intermediate_size n_group topk_group score_rank value_dim embed_dim kernel_size""".split()
ABOVE_ZERO = """alpha routed_scaling_factor initializer_range layer_norm_eps usage_threshold rope_theta learning_rate adam_epsilon max_grad_norm table_max_grad_norm
    num_train_epochs weight beta_fast beta_slow mscale mscale_all_dim""".split()
below, above = st.floats(max_value=-1e-9, allow_infinity=False), st.floats(min_value=1.001, allow_infinity=False)
OUT_OF_RANGE = (
    dict.fromkeys(FROM_ONE, st.integers(-2**63, 0)) | dict.fromkeys(ABOVE_ZERO, below | st.just(0)) |
    dict.fromkeys(("weight_decay", "table_learning_rate", "table_weight_decay", "balance_coefficient", "bias_update_rate", "z_loss_coefficient"), below) | dict.fromkeys(("peer_start_layer", "num_workers", "pretrained_layer_step", "layer", "warm_up", "n_shared_experts"), st.integers(-2**63, -1)) |
    dict.fromkeys(("dropout", "adam_beta1", "adam_beta2"), below | above | st.just(1)) |
    dict(factor=st.floats(max_value=0.999, allow_infinity=False), lora_plus_ratio=st.floats(max_value=0.999, allow_infinity=False), repetition_penalty=st.floats(max_value=0.999, allow_infinity=False), ngram_size=st.integers(-2**63, 1), table_size=st.integers(-2**63, 1), held_out_pairs=below | above | st.sampled_from([0, 1]), warmup_ratio=below | above, heldout_fraction=below | above | st.sampled_from([0, 1]), seed=st.integers(-2**63, -1) | st.integers(2**32, 2**63 - 1),
         product_key_dim=st.just([]), tokenizer_name=st.sampled_from(["corpus:", "corpus:bpe", "corpus:bpe:256", "corpus:bpe:-5", "corpus:wordpiece:500"]),
         text_template=st.sampled_from(["no field", "{", "}", "{}", "{0}", "{a.b}", "{a[0]}", "{a:{b}}"])))


@quick
@given(st.sampled_from([key for key in LEAVES if known_keys()[key].name in OUT_OF_RANGE]), st.data())
def test_any_value_out_of_range(key, data):
    tree = copy.deepcopy(FULL)
    keys, name, path = parent_of(tree, key)
    value = data.draw(OUT_OF_RANGE[name])
    keys[name] = data.draw(st.sampled_from([value, repr(value)])) if isinstance(value, (int, float)) else value
    assert "is not allowed; allowed: " in str(refused(tree, path))


def test_every_number_has_a_range():
    numbers = {known.name for key, known in known_keys().items() if known.leaf and plain(known.kind) in ("whole", "number")}
    assert numbers <= set(OUT_OF_RANGE)


SECTIONS = [key for key, known in known_keys().items() if not known.leaf]


@pytest.mark.parametrize("key", SECTIONS)
@pytest.mark.parametrize("value", [5, "text", True, ["x"], [[]], [None], [{}], {"": 1}, {None: 1}, {1: 1}, {"*": 1}, {"a.b": 1}, {True: False}])
def test_a_section_that_is_none(key, value):
    tree = copy.deepcopy(FULL)
    keys, name, path = parent_of(tree, key)
    keys[name] = value
    with pytest.raises(ConfigError) as info: config_from_dict(tree, "some file.yaml")
    assert info.value.key.startswith(path)


CONTRADICTIONS = {   # key that is named -> overrides of the tiny configuration
    "train_config.bf16": {"train_config.fp16": True, "train_config.bf16": True},
    "train_config.fp8": {"train_config.fp8": True, "train_config.fp16": True},
    "train_config.max_tokens": {"train_config.max_tokens": 5, "train_config.max_steps": 5},
    "train_config.num_train_epochs": {"train_config.max_tokens": 5, "train_config.num_train_epochs": 1},
    "model_config.peer_config.num_experts": {"model_config.peer_config.num_experts": 65},
    "model_config.peer_config.query_dim": {"model_config.peer_config.query_dim": 17},
    "model_config.peer_config.num_experts_per_tok": {"model_config.peer_config.num_experts_per_tok": 65},
    "model_config.peer_config.query_norm": {"model_config.peer_config.query_norm": "none"},
    "model_config.peer_config.table_gradient": {"model_config.peer_config.table_gradient": "consumed"},
    "model_config.peer_start_layer": {"model_config.peer_start_layer": 2},
    "model_config.memory_layers.1": {"model_config.memory_layers": [0, 2]},
    "model_config.memory_layers.2": {"model_config.memory_layers": [0, 1, 0]},
    "dataset_config.max_seq_length": {"dataset_config.max_seq_length": 65},
    "dataset_config.tokenizer_name": {"dataset_config.tokenizer_name": "corpus:bpe:1000"},
    "dataset_config.datasets.0.name": {"dataset_config.datasets": [ENTRIES[0], ENTRIES[0]]},
    "eval_config.datasets.0.name": {"eval_config.datasets": [ENTRIES[0], ENTRIES[0]]},
    "dataset_config.tokenizer_corpus.0.text_template": {"dataset_config.tokenizer_corpus": [ENTRIES[0] | dict(text_field="q", text_template="{q}")]},
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_contradictions(key, tmp_path):
    base = config_from_dict(dict(model_config=TINY, dataset_config=dict(max_seq_length=64)))
    with pytest.raises(ConfigError) as info: apply_overrides(base, CONTRADICTIONS[key])
    assert (info.value.file, info.value.key) == ("override", key)
    path = save_config(base, tmp_path/"tiny.yaml")
    with pytest.raises(ConfigError) as info: load_config(path, CONTRADICTIONS[key])
    assert (info.value.file, info.value.key) == (str(path), key)


@pytest.mark.parametrize("changes", [
    {"model_config.peer_config.num_experts_per_tok": 1}, {"model_config.peer_config.query_norm": "batch", "model_config.peer_config.batch_norm_query": False},
    {"model_config.peer_config.table_gradient": "sparse", "train_config.parallel": "fsdp2"}, {"model_config.peer_config.table_dtype": "bfloat16", "train_config.parallel": "fsdp2"},
    {"model_config.peer_config.table_gradient": "consumed", "train_config.parallel": "fsdp2"}, {"train_config.fp8": True, "train_config.bf16": True}])
def test_more_contradictions(changes):
    with pytest.raises(ConfigError): apply_overrides(Config(), changes)


def test_an_override_may_resolve_a_contradiction(tmp_path):
    (tmp_path/"run.yaml").write_text("train_config: {num_train_epochs: 3, max_tokens: 5}")
    with pytest.raises(ConfigError, match="contradicts"): load_config(tmp_path/"run.yaml")
    assert load_config(tmp_path/"run.yaml", ["train_config.num_train_epochs=null"]).train_config.max_tokens == 5


# ---- arbitrary input ------------------------------------------------------------------------------------------------------

def outcome(call, *args):
    "The result of a call, or the ConfigError that it raised; no other exception is caught"
    try: return call(*args)
    except ConfigError as e:
        assert str(e)
        return e


@quick
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | st.text("[]{}:,-&*!|>'\"#%@` \n\tab01.e", max_size=40).map(str.encode))
def test_arbitrary_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp()/"any.yaml"
    path.write_bytes(content)
    assert isinstance(outcome(load_config, path), (Config, ConfigError))
    assert isinstance(outcome(load_data_mixes, path), (dict, ConfigError))


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(LEAVES).map(lambda key: key.split(".")[-1]),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted({step for key in LEAVES for step in key.split(".")})) | st.text(max_size=4), inner, max_size=3), max_leaves=12)


@quick
@given(st.dictionaries(st.sampled_from([*FULL, "data_mixes"]), anything, min_size=1))
def test_arbitrary_trees(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp()/"any.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    assert isinstance(outcome(load_config, path), (Config, ConfigError))
    assert isinstance(outcome(load_data_mixes, path), (dict, ConfigError))
    assert isinstance(outcome(config_from_dict, tree), (Config, ConfigError))


@quick
@given(st.dictionaries(st.sampled_from(LEAVES).map(lambda key: key.replace("*", "0")) | st.text("abc_.01", max_size=12), anything, min_size=1, max_size=3), st.text("abc_.=[]{}:1e5 ", max_size=20))
def test_arbitrary_overrides(changes, word):
    assert isinstance(outcome(apply_overrides, Config(), changes), (Config, ConfigError))
    assert isinstance(outcome(apply_overrides, Config(), [word]), (Config, ConfigError))


@st.composite
def valid_changes(draw):
    "Values that are in range, by themselves, for some keys"
    texts = st.text(min_size=1, max_size=12).filter(lambda t: t.strip() and "\0" not in t and not t.startswith("corpus:"))
    kinds = {"whole": st.integers(2, 2**31).map(lambda x: 2*x), "number": st.floats(1e-9, 0.99), "bool": st.booleans(), "text": texts}
    chosen = draw(st.lists(st.sampled_from([key for key in LEAVES if plain(known_keys()[key].kind) in kinds]), max_size=8, unique=True))
    return {key.replace("*", "1"): draw(st.just("{a} {b}") if key.endswith("template") else st.integers(0, 2**32 - 1) if key.endswith("seed") else kinds[plain(known_keys()[key].kind)]) for key in chosen}


@settings(quick, max_examples=60)   # each one is forced to the disk
@given(valid_changes())
def test_round_trip_of_any_valid_configuration(tmp_path_factory, changes):
    full = config_from_dict(copy.deepcopy(FULL))
    cfg = outcome(apply_overrides, full, changes)
    if isinstance(cfg, ConfigError): return   # the values contradict each other
    path = save_config(cfg, tmp_path_factory.getbasetemp()/"valid.yaml")
    again = load_config(path)
    assert again == cfg and config_hash(again) == config_hash(cfg)
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == to_dict(cfg)   # other readers see the same
    assert set(diff_configs(full, cfg)) <= set(changes)
    assert apply_overrides(full, {key: new for key, (_, new) in diff_configs(full, cfg).items()}) == cfg


@pytest.mark.parametrize("deep", [6, 30])
def test_aliases_are_bounded(deep, tmp_path):
    "A few hundred bytes that stand for more than memory holds: refused at once, whichever file it is"
    bomb = tmp_path/"bomb.yaml"
    bomb.write_text("a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}']*9)}]\n" for n in range(deep)))
    for read in (load_config, load_data_mixes, load_study):
        with pytest.raises(ConfigError, match="aliases stand for"): read(bomb)
    plain = tmp_path/"plain.yaml"
    plain.write_text("train_config: &t {max_steps: 3}\n")
    assert load_config(plain).train_config.max_steps == 3


def test_entries_of_a_study_may_be_objects():
    cfg = apply_overrides(Config(), {"dataset_config.datasets": [DatasetEntry("a", "a.txt")]})
    assert validate(cfg).dataset_config.datasets == [DatasetEntry("a", "a.txt")]
