"A model that exists already is trained by the same loop: what transformers and torch do with it by themselves is what comes out."
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM,
                          OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM)

from peer_nb.analysis.any_model import count_any
from peer_nb.analysis.parameters import count_parameters, count_pretrained, count_run
from peer_nb.config import Config, ConfigError, DatasetConfig, DatasetEntry, EvalConfig, ModelConfig, TrainConfig, apply_overrides, config_from_dict
from peer_nb.config import load_config, save_config, to_dict
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.loading import load_model
from peer_nb.files import UserError, read_json
from peer_nb.study.identity import section_hashes
from peer_nb.training.checkpoints import latest_checkpoint
from peer_nb.training.loop import Trainer, main, train
from test_training import assert_same, one_thread, text, timeless   # noqa: F401 (fixtures)

SMALL = dict(vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, bos_token_id=256, eos_token_id=256, pad_token_id=256)
MODELS = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.1)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64, max_position_embeddings=64)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=256, eos_token_id=256))}


def saved(kind: str, folder: Path, seed: int = 0, tokenizer: bool = True) -> Path:
    "A model with random weights, as somebody else would have saved it"
    torch.manual_seed(seed)
    MODELS[kind]().save_pretrained(folder)
    if tokenizer: load_tokenizer(DatasetConfig(tokenizer_name="bytes")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {kind: saved(kind, root/kind) for kind in MODELS}


def run_of(base: Path, text: Path, out: Path, packing: str = "rows", **keys) -> Config:
    keys = dict(output_dir=str(out), per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, max_steps=6, logging_steps=3,
                save_steps=3, eval_steps=6, log_level="error", keep_optimizer_state=True) | keys
    sources = [DatasetEntry("sums", str(text))]
    return Config(ModelConfig(pretrained=str(base)), TrainConfig(**keys), DatasetConfig(sources, max_seq_length=32, heldout_fraction=0.1, packing=packing),
                  EvalConfig(datasets=sources, eval_batch_size=16))


@pytest.mark.parametrize("kind", MODELS)
def test_three_steps_are_what_torch_and_transformers_make_of_the_same_batches(kind, bases, text, tmp_path):
    cfg = run_of(bases[kind], text, tmp_path, max_steps=3, lr_scheduler_type="constant", warmup_ratio=0.0)
    trainer = Trainer(cfg)
    trainer.model.eval()   # dropout draws its numbers in another order outside
    oracle = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32)
    tables = {id(m.weight) for m in oracle.modules() if isinstance(m, torch.nn.Embedding)}
    decayed = [p for p in oracle.parameters() if p.ndim == 2 and id(p) not in tables]
    others = [p for p in oracle.parameters() if p.ndim != 2 or id(p) in tables]
    t = cfg.train_config
    optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=t.weight_decay), dict(params=others, weight_decay=0.0)], lr=t.learning_rate,
                                  betas=(t.adam_beta1, t.adam_beta2), eps=t.adam_epsilon)
    read = trainer.read_batches
    for _ in range(3):
        batches = read()
        trainer.read_batches = lambda: batches
        result = trainer.step()
        rows = torch.cat([b["input_ids"] for b in batches])
        loss = oracle(input_ids=rows, labels=torch.cat([b["labels"] for b in batches])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), t.max_grad_norm)
        optimizer.step(); optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), abs=2e-5)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), oracle.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("kind", MODELS)
def test_packed_documents_have_the_loss_that_each_has_alone(kind, bases, text, tmp_path):
    trainer = Trainer(run_of(bases[kind], text, tmp_path, packing="varlen"))
    trainer.model.eval()
    batch = trainer.read_batches()[0]
    oracle = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32).eval()
    begins = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["position_ids"].shape[1]]
    assert len(begins) >= 3
    with torch.no_grad():
        ours = trainer.model(**batch, num_items_in_batch=1, use_cache=False).loss
        alone = 0.0
        for a, b in zip(begins, begins[1:]):
            if b - a < 2: continue
            logits = oracle(input_ids=batch["input_ids"][:, a:b]).logits[0, :-1]
            alone += torch.nn.functional.cross_entropy(logits, batch["labels"][0, a + 1:b], reduction="sum")
    assert ours.item() == pytest.approx(alone.item(), rel=1e-5)


def test_a_stopped_run_ends_as_the_straight_one_and_others_can_read_it(bases, text, tmp_path):
    train(run_of(bases["opt"], text, tmp_path/"straight"))
    shutil.copytree(tmp_path/"straight", tmp_path/"halves")
    shutil.rmtree(tmp_path/"halves"/"checkpoint-6")
    result = train(run_of(bases["opt"], text, tmp_path/"halves"), resume=True)
    a, b = (latest_checkpoint(tmp_path/name) for name in ("straight", "halves"))
    assert (a/"model.safetensors").read_bytes() == (b/"model.safetensors").read_bytes()
    assert_same(*(torch.load(folder/"trainer_state"/"state.pt", weights_only=True) for folder in (a, b)))
    assert timeless(tmp_path/"straight") == timeless(tmp_path/"halves")
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(b), AutoTokenizer.from_pretrained(b)
    ids = tokenizer("1 plus 2 is", return_tensors="pt").input_ids
    with torch.no_grad(): assert torch.equal(theirs(ids).logits, result.model(ids).logits)
    assert type(theirs) is OPTForCausalLM and load_model(b)[1]("1")["input_ids"] == tokenizer("1")["input_ids"]


def test_one_of_ours_goes_on_as_a_pretrained_one(text, tmp_path):
    "Its architecture is in its folder: memory layers, batch statistics and all"
    from test_training import config
    first = train(config(text, tmp_path/"first", max_steps=4))
    cfg = run_of(first.checkpoint, text, tmp_path/"second")
    trainer = Trainer(cfg)
    assert count_run(cfg) == count_parameters(config(text, tmp_path).model_config, 32)
    assert_same(dict(trainer.model.state_dict()), dict(first.model.state_dict()))
    result = train(run_of(first.checkpoint, text, tmp_path/"second"))
    assert result.checkpoint.name == "checkpoint-6" and result.metrics[-1]["loss"] < first.metrics[0]["loss"]


def test_the_base_is_known_by_its_content(bases, text, tmp_path):
    cfg = run_of(bases["opt"], text, tmp_path/"run")
    train(cfg)
    moved = shutil.copytree(bases["opt"], tmp_path/"moved")
    there = run_of(moved, text, tmp_path/"run")
    assert section_hashes(there) == section_hashes(cfg)
    Trainer(there).restore(latest_checkpoint(tmp_path/"run"))   # the same model at another place
    other = saved("opt", tmp_path/"other", seed=1)
    assert section_hashes(run_of(other, text, tmp_path/"run"))["model_config"] != section_hashes(cfg)["model_config"]
    with pytest.raises(UserError, match="began with another model"):
        Trainer(run_of(other, text, tmp_path/"run")).restore(latest_checkpoint(tmp_path/"run"))


def test_keys_of_an_architecture_are_refused_beside_it_and_a_saved_file_is_not(bases, text, tmp_path):
    for key, value in {"hidden_size": 64, "use_peer": False, "peer_config.num_heads": 4, "dropout": 0.1}.items():
        with pytest.raises(ConfigError, match=rf"model_config.{key}: .* contradicts pretrained"):
            apply_overrides(run_of(bases["opt"], text, tmp_path), {f"model_config.{key}": value})
    cfg = run_of(bases["opt"], text, tmp_path)
    assert load_config(save_config(cfg, tmp_path/"run.yaml")) == cfg == config_from_dict(to_dict(cfg))
    assert cfg.dataset_config.tokenizer_name == str(bases["opt"])


@pytest.mark.parametrize("kind", MODELS)
def test_sizes_and_operations_are_told_without_the_model(kind, bases):
    "Parameters as torch counts them, operations as its counter sees them on a model without values"
    model = MODELS[kind]()
    count = count_pretrained(bases[kind], 48)
    assert count.total == sum(p.numel() for p in model.parameters())
    found = count_any(json.loads((bases[kind]/"config.json").read_text()), context=48)
    assert count.flops_per_token == found["flops_per_token"] and count.context == 48
    assert count.active == found["active"]


def test_what_does_not_fit_is_one_line(bases, text, tmp_path, capsys):
    def said(base, *changes) -> str:
        save_config(run_of(base, text, tmp_path/"run"), tmp_path/"run.yaml")
        capsys.readouterr()
        assert main(["--config", str(tmp_path/"run.yaml"), *changes]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]
    assert "reads 64 tokens" in said(bases["opt"], "dataset_config.max_seq_length=65")
    assert "no tokenizer" in said(saved("opt", tmp_path/"mute", tokenizer=False))
    assert "holds no model" in said(tmp_path)
    assert "no such folder" in said(tmp_path/"nowhere")
    other = tmp_path/"words"
    load_tokenizer(DatasetConfig([DatasetEntry("sums", str(text))], "corpus:bpe:258", heldout_fraction=0.1)).save_pretrained(other)
    assert "is not the tokenizer of" in said(bases["opt"], f"dataset_config.tokenizer_name={other}")
    assert not read_json(tmp_path/"run"/"heartbeat.json")
    same = apply_overrides(run_of(bases["opt"], text, tmp_path/"same", max_steps=1), {"dataset_config.tokenizer_name": "bytes"})
    assert train(same).steps == 1   # equal vocabularies
    config = json.loads((bases["llama"]/"config.json").read_text()) | dict(model_type="mine", auto_map=dict(AutoModelForCausalLM="own.Model", AutoConfig="own.C"))
    strange = shutil.copytree(bases["llama"], tmp_path/"strange")
    (strange/"config.json").write_text(json.dumps(config))
    (strange/"own.py").write_text("raise SystemExit('somebody else code was run')")
    assert "cannot be loaded" in said(strange, "dataset_config.tokenizer_name=bytes")
