"Adapters: what peft makes of the same batches is what comes out; stopped, killed, merged and read by others."
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from children import in_child
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from test_pretrained import MODELS, bases, run_of, saved   # noqa: F401 (fixtures)
from test_training import assert_same, config, one_thread, text, timeless   # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM

from peer_nb.config import Config, ConfigError, LoraConfig, apply_overrides, save_config
from peer_nb.evaluation.loading import load_model
from peer_nb.files import UserError
from peer_nb.lora_targets import adaptable, adapter_parameters, find_targets
from peer_nb.pretrained import tensor_shapes
from peer_nb.training.adapters import add_adapters, merge_adapters
from peer_nb.training.checkpoints import latest_checkpoint
from peer_nb.training.loop import Trainer, main, train
from peer_nb.training.optim import parameter_groups

VARIANTS = {"plain": {}, "rsLoRA": dict(rslora=True), "DoRA": dict(dora=True), "PiSSA": dict(init="pissa"), "OLoRA": dict(init="olora"),
            "gaussian, dropout": dict(init="gaussian", dropout=0.2), "LoRA+": dict(lora_plus_ratio=4)}


def adapter_run(base: Path, text: Path, out: Path, packing: str = "rows", train: dict = {}, **lora) -> Config:
    cfg = run_of(base, text, out, packing, **train)
    return Config(cfg.model_config, cfg.train_config, cfg.dataset_config, cfg.eval_config, lora_config=LoraConfig(**dict(rank=4) | lora))


# ---- names ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", MODELS)
def test_all_is_every_matrix_of_the_layers(kind, bases):
    "peft's own all-linear, which leaves out the head"
    model = MODELS[kind]()
    with_peft = get_peft_model(model, PeftLora(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    theirs = {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in with_peft.named_parameters() if ".lora_A." in name}
    here = find_targets(["all"], kind, adaptable(tensor_shapes(bases[kind])))
    assert {name.partition(".")[2] if not name.startswith(("model", "transformer")) else name for name in here} <= theirs | {t.partition(".")[2] for t in theirs}
    assert len(here) == len(theirs)


MEANT = {   # model, alias -> ends of names
    ("opt", "qv"): {"q_proj", "v_proj"}, ("opt", "attn"): {"q_proj", "k_proj", "v_proj", "out_proj"}, ("opt", "mlp"): {"fc1", "fc2"},
    ("llama", "attn"): {"q_proj", "k_proj", "v_proj", "o_proj"}, ("mistral", "mlp"): {"gate_proj", "up_proj", "down_proj"},
    ("qwen2", "qv"): {"q_proj", "v_proj"}, ("gpt2", "qv"): {"c_attn"}, ("gpt2", "attn"): {"c_attn", "c_proj"}, ("gpt2", "mlp"): {"c_fc", "c_proj"}}


@pytest.mark.parametrize("kind,alias", MEANT)
def test_an_alias_means_these_modules(kind, alias, bases):
    found = find_targets([alias], kind, adaptable(tensor_shapes(bases[kind])))
    assert {name.rpartition(".")[2] for name in found} == MEANT[kind, alias]
    assert {name.split(".")[-3 if kind in ("gpt2",) or alias != "mlp" or kind != "opt" else -2] for name in found} == {"0", "1"}


def test_the_names_of_opt_work_on_opt_and_are_answered_on_a_llama(bases):
    names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    assert len(find_targets(names, "opt", adaptable(tensor_shapes(bases["opt"])))) == 12
    with pytest.raises(UserError, match=r"'out_proj' names no module of this llama model \(near: .*o_proj.*\); its modules: .*gate_proj"):
        find_targets(names, "llama", adaptable(tensor_shapes(bases["llama"])))


def test_one_of_ours_has_latent_attention_and_tables(text, tmp_path):
    trainer = Trainer(config(text, tmp_path))
    modules = adaptable({name: tuple(p.shape) for name, p in trainer.model.named_parameters()})
    ends = lambda alias: {name.rpartition(".")[2] for name in find_targets([alias], "peer_mla", modules)}
    assert ends("attn") == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} and ends("memory") == {"expert_down", "expert_up"}
    assert ends("all") == ends("attn") | ends("memory")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dora", [False, True])
def test_parameters_are_counted_from_shapes(kind, dora, bases):
    lora = LoraConfig(rank=3, dora=dora, target_modules=["attn", "mlp"])
    model = AutoModelForCausalLM.from_pretrained(bases[kind])
    assert add_adapters(model, lora, str(bases[kind])) == adapter_parameters(lora, kind, tensor_shapes(bases[kind]))


# ---- training ------------------------------------------------------------------------------------------------------------

def by_peft(base: Path, lora: LoraConfig, trainer: Trainer):
    "The same model adapted by peft alone, with our beginning"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = list(find_targets(lora.target_modules, model.config.model_type, adaptable({n: tuple(p.shape) for n, p in model.named_parameters()})))
    model = get_peft_model(model, PeftLora(r=lora.rank, lora_alpha=lora.alpha, use_rslora=lora.rslora, use_dora=lora.dora, target_modules=targets,
                                           init_lora_weights=True if lora.init == "default" else lora.init, task_type="CAUSAL_LM",
                                           fan_in_fan_out=model.config.model_type == "gpt2"))
    own = dict(trainer.model.named_parameters())
    for name, p in model.named_parameters(): p.data.copy_(own[name.removeprefix("base_model.model.")])
    return model


@pytest.mark.parametrize("kind,variant", [("opt", v) for v in ("plain", "rsLoRA", "DoRA", "PiSSA", "LoRA+")] + [("llama", "plain"), ("gpt2", "plain")])
def test_three_steps_are_those_of_peft(kind, variant, bases, text, tmp_path):
    steady = dict(max_steps=3, lr_scheduler_type="constant", warmup_ratio=0.0, weight_decay=0.0)
    cfg = adapter_run(bases[kind], text, tmp_path, train=steady, target_modules=["attn"], **VARIANTS[variant])
    trainer, t = Trainer(cfg), cfg.train_config
    trainer.model.eval()
    oracle = by_peft(bases[kind], cfg.lora_config, trainer).eval()
    keys = dict(betas=(t.adam_beta1, t.adam_beta2), eps=t.adam_epsilon)
    ratio = cfg.lora_config.lora_plus_ratio
    if ratio: optimizer = create_loraplus_optimizer(oracle, torch.optim.AdamW, lr=t.learning_rate, loraplus_lr_ratio=ratio, **keys)
    else: optimizer = torch.optim.AdamW([p for p in oracle.parameters() if p.requires_grad], lr=t.learning_rate, weight_decay=0.0, **keys)
    read, start = trainer.read_batches, {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for _ in range(3):
        batches = read()
        trainer.read_batches = lambda: batches
        result = trainer.step()
        loss = oracle(input_ids=torch.cat([b["input_ids"] for b in batches]), labels=torch.cat([b["labels"] for b in batches])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in oracle.parameters() if p.requires_grad], t.max_grad_norm)
        optimizer.step(); optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), abs=2e-5)
    theirs = dict(oracle.named_parameters())
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p, theirs[f"base_model.model.{name}"], atol=2e-4, rtol=1e-3, msg=lambda m: f"{name}: {m}")
        assert torch.equal(p, start[name]) != ("lora_" in name), name


def test_loraplus_has_pefts_learning_rates(bases, text, tmp_path):
    cfg = adapter_run(bases["opt"], text, tmp_path, lora_plus_ratio=16, dora=True)
    trainer = Trainer(cfg)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    ours = {names[id(p)]: group["lr"] for group in parameter_groups(trainer.model, cfg.train_config, lora=cfg.lora_config) for p in group["params"]}
    theirs = create_loraplus_optimizer(trainer.model, torch.optim.AdamW, lr=cfg.train_config.learning_rate, loraplus_lr_ratio=16)
    told = {names[id(p)]: group["lr"] for group in theirs.param_groups for p in group["params"]}
    matrices = [name for name in ours if "magnitude" not in name]
    assert {n: ours[n] for n in matrices} == {n: told[n] for n in matrices} and len({*ours.values()}) == 2


# ---- stopped, killed, read again -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_straight_and_resumed_are_the_same_to_the_bit(variant, bases, text, tmp_path):
    make = lambda name: adapter_run(bases["opt"], text, tmp_path/name, "varlen", **VARIANTS[variant])
    train(make("straight"))
    shutil.copytree(tmp_path/"straight", tmp_path/"halves")
    shutil.rmtree(tmp_path/"halves"/"checkpoint-6")
    train(make("halves"), resume=True)
    a, b = (latest_checkpoint(tmp_path/name) for name in ("straight", "halves"))
    assert (a/"adapter_model.safetensors").read_bytes() == (b/"adapter_model.safetensors").read_bytes()
    assert_same(*(torch.load(folder/"trainer_state"/"state.pt", weights_only=True) for folder in (a, b)))
    assert timeless(tmp_path/"straight") == timeless(tmp_path/"halves")
    assert not list(a.glob("model*")) and (a/"adapter_model.safetensors").stat().st_size < (bases["opt"]/"model.safetensors").stat().st_size


def killed_after_five_steps(cfg: Config):
    original = Trainer.step

    def step(self):
        result = original(self)
        if self.counters.step == 5: os.kill(os.getpid(), signal.SIGKILL)
        return result

    Trainer.step = step
    train(cfg)


@pytest.mark.slow
def test_a_killed_run_loses_nothing(bases, text, tmp_path):
    train(adapter_run(bases["opt"], text, tmp_path/"straight"))
    in_child(killed_after_five_steps, adapter_run(bases["opt"], text, tmp_path/"killed"), ends=-signal.SIGKILL)
    train(adapter_run(bases["opt"], text, tmp_path/"killed"), resume=True)
    a, b = (latest_checkpoint(tmp_path/name)/"adapter_model.safetensors" for name in ("straight", "killed"))
    assert a.read_bytes() == b.read_bytes() and timeless(tmp_path/"straight") == timeless(tmp_path/"killed")


@pytest.mark.parametrize("kind,variant", [("opt", v) for v in VARIANTS] + [(k, "plain") for k in ("llama", "mistral", "qwen2", "gpt2")])
def test_merged_it_computes_the_same_and_others_read_it(kind, variant, bases, text, tmp_path):
    result = train(adapter_run(bases[kind], text, tmp_path/"run", merge=True, **VARIANTS[variant]))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        adapted, plain = result.model(ids).logits, AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32)(ids).logits
        assert (adapted - plain).abs().max() > 1e-3
        readings = {
            "our loader": load_model(result.checkpoint)[0],
            "peft": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32), result.checkpoint),
            "merged": load_model(tmp_path/"run"/"merged")[0]}
        if variant != "DoRA":   # whose magnitudes transformers 5.23 looks for under another name than it saved them
            readings["transformers"] = AutoModelForCausalLM.from_pretrained(result.checkpoint, dtype=torch.float32)
        for who, model in readings.items():
            assert (model.eval()(ids).logits - adapted).abs().max() <= 1e-5, who
    assert main(["--merge", str(result.checkpoint), str(tmp_path/"again")]) == 0
    assert_same(dict(load_model(tmp_path/"again")[0].state_dict()), dict(readings["merged"].state_dict()))
    assert type(readings["merged"]) is type(MODELS[kind]()) and not [n for n, _ in readings["merged"].named_parameters() if "lora" in n]


def test_batch_statistics_of_a_memory_stay_those_of_the_base(text, tmp_path):
    first = train(config(text, tmp_path/"first", max_steps=4))
    statistics = {name: value.clone() for name, value in first.model.state_dict().items() if "running_" in name}
    assert statistics
    result = train(adapter_run(first.checkpoint, text, tmp_path/"run", merge=True, target_modules=["attn", "memory"]))
    merged = load_model(tmp_path/"run"/"merged")[0]
    for model in (result.model, merged):
        state = model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in statistics.items())
    ids = torch.arange(40)[None]
    with torch.no_grad(): assert (merged(ids).logits - result.model(ids).logits).abs().max() <= 1e-5
    assert type(merged) is type(first.model)


def test_adapters_are_not_added_to_another_base(bases, text, tmp_path):
    mine = shutil.copytree(bases["opt"], tmp_path/"mine")
    cfg = adapter_run(mine, text, tmp_path/"run")
    result = train(cfg)
    shutil.rmtree(mine)
    saved("opt", mine, seed=5)   # trained on, in the same place
    with pytest.raises(UserError, match="began with another model"): Trainer(cfg).restore(result.checkpoint)
    with pytest.raises(UserError, match="has other weights than when these adapters were made"): merge_adapters(result.checkpoint)


def test_adapters_that_are_there_in_part_or_no_numbers_are_refused(bases, text, tmp_path, capsys):
    "By the merge as by scores: peft makes up what is missing, with a warning"
    result = train(adapter_run(bases["opt"], text, tmp_path/"run"))
    file = result.checkpoint/"adapter_model.safetensors"
    (result.checkpoint/"trainer_state"/"files.json").unlink()   # as a copy without its seal
    weights = load_file(file)
    name = next(name for name in weights if "lora_B" in name)
    for kept, named in (({n: w for n, w in weights.items() if n != name}, "missing adapter keys"), (weights | {name: weights[name]*torch.nan}, "not finite")):
        save_file(kept, file)
        with pytest.raises(UserError, match=named): load_model(result.checkpoint)
        assert main(["--merge", str(result.checkpoint), str(tmp_path/"out")]) == 2 and named in capsys.readouterr().err
    assert not (tmp_path/"out").exists()


def test_mistakes_are_one_line(bases, text, tmp_path, capsys):
    def said(*changes, cfg=None) -> str:
        save_config(cfg or adapter_run(bases["opt"], text, tmp_path/"run"), tmp_path/"run.yaml")
        capsys.readouterr()
        assert main(["--config", str(tmp_path/"run.yaml"), *changes]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]
    assert "lora_config.rank: 0 is not allowed" in said("lora_config.rank=0")
    assert "rank: 33 is more than model.decoder.layers.0.self_attn.k_proj is wide (32 × 32)" in said("lora_config.rank=33")
    assert "'quary' names no module" in said("lora_config.target_modules=[quary]")
    assert "near: o" not in said("lora_config.target_modules=[fc9]") and "fc1" in said("lora_config.target_modules=[fc9]")
    assert "'eva' is not allowed; allowed: default | gaussian" in said("lora_config.init=eva")
    assert "contradicts lora_config" in said("train_config.freeze_layer_map={'*': 'freeze'}")
    assert "adapters need a model" in said(cfg=apply_overrides(config(text, tmp_path/"run"), {"lora_config": {"rank": 2}}))
    result = train(adapter_run(bases["opt"], text, tmp_path/"done"))
    assert "is an adapter, and no model of its own; put it into its base first: peer-train --merge" in said(cfg=run_of(result.checkpoint, text, tmp_path/"x"))
    assert main(["--merge", str(bases["opt"]), str(tmp_path/"out")]) == 2 and "no checkpoint of adapters" in capsys.readouterr().err
    assert main(["--merge", str(result.checkpoint)]) == 2 and "OUT is missing" in capsys.readouterr().err
    for place in (bases["opt"], result.checkpoint, tmp_path/"run.yaml"):   # a model, the adapters themselves, a file
        before = {path: path.read_bytes() for path in [place, *place.rglob("*")] if path.is_file()}
        assert main(["--merge", str(result.checkpoint), str(place)]) == 2 and "is there already" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in [place, *place.rglob("*")] if path.is_file()} == before


@pytest.mark.slow
def test_two_processes_train_the_same_adapters_replicated_or_sharded(bases, text, tmp_path):
    "DDP and FSDP2 on the same rows; what either leaves is what peft reads"
    from safetensors.torch import load_file

    from peer_nb.training.launch import launch
    weights = {}
    for kind in ("ddp", "fsdp2"):
        cfg = apply_overrides(adapter_run(bases["opt"], text, tmp_path/kind, target_modules=["attn"]), {"train_config.parallel": kind})
        done = launch(cfg, processes=2, progress=False)
        assert done.exit_code == 0 and done.checkpoint.name == "checkpoint-6"
        weights[kind] = load_file(done.checkpoint/"adapter_model.safetensors")
        assert load_model(done.checkpoint)[0].config.model_type == "opt"
    assert weights["ddp"].keys() == weights["fsdp2"].keys()
    for name, value in weights["ddp"].items(): torch.testing.assert_close(value, weights["fsdp2"][name], atol=1e-5, rtol=1e-4)
