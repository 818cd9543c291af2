"Mixtures of experts, UltraMem and n-grams are citizens: two processes, adapters, freezing, layers from elsewhere, compilation, statistics, mistakes"
import json
from pathlib import Path

import pytest
import torch
from test_parallel import STEPS, STOP, assert_same_end, config, stopping, text, timeless  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

from peer_nb.analysis.command import main as analyze
from peer_nb.analysis.expert_usage import counted_layers, usage_summary
from peer_nb.config import Config, DatasetConfig, apply_overrides, save_config, to_dict
from peer_nb.data.corpora import load_tokenizer
from peer_nb.evaluation.loading import load_model
from peer_nb.files import UserError
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.training.checkpoints import latest_checkpoint
from peer_nb.training.freezing import freeze_model_layers
from peer_nb.training.launch import run_ranks
from peer_nb.processes import join_processes
from peer_nb.training.layer_loading import PretrainedLayerLoader
from peer_nb.training.loop import Trainer, main, train

EXPERTS = dict(n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=9, n_shared_experts=1)
KINDS = { # what model_config says
    "moe": {"memory_kind": "moe", "moe_config": EXPERTS | dict(bias_update_rate=.01)},
    "ultramem": {"memory_kind": "ultramem", "peer_config.query_norm": None},
    "engram": {"use_peer": False, "engram_config": dict(layers=[0, 1], num_heads=2, table_size=50, embed_dim=16)}}
OWN = {"moe": "*.experts", "ultramem": "*.memory", "engram": "*.engram"}


def of_kind(kind: str, cfg: Config) -> Config: return apply_overrides(cfg, {f"model_config.{key}": value for key, value in KINDS[kind].items()})


def tiny(kind: str, seed: int = 0, **changes) -> PeerMLAForCausalLM:
    torch.manual_seed(seed)
    m = of_kind(kind, config(Path("x"), Path("x"))).model_config
    model = PeerMLAForCausalLM(PeerMLAConfig(**to_dict(Config(model_config=m))["model_config"] | changes))
    if kind == "engram":
        model.get_decoder().take_tokens(load_tokenizer(DatasetConfig(tokenizer_name="bytes")))
        for layer in model.model.layers: torch.nn.init.normal_(layer.engram.conv)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ids(): return torch.randint(2, 97, (2, 13), generator=torch.Generator().manual_seed(3))


# ---- several processes ------------------------------------------------------------------------------------------------

def rank_program(words: list[str]) -> int:
    "What each of two processes does: whole runs, and runs that one of them is asked to stop"
    text, place = map(Path, words)
    torch.set_num_threads(1)
    step = Trainer.step
    with join_processes("ddp") as processes:
        for kind in KINDS:
            for share in ("ddp", "fsdp2"):
                def run(name): return of_kind(kind, config(text, place/kind/share/name, share, log_level="error"))
                train(run("whole"))
                Trainer.step = stopping(step)
                try: train(run("halves"))
                except SystemExit as stop: processes.wait(); assert stop.code == 75
                Trainer.step = step
                train(run("halves"), resume=True)
    return 0


@pytest.fixture(scope="module")
def place(text, tmp_path_factory) -> Path:  # noqa: F811
    place = tmp_path_factory.mktemp("kinds")
    assert run_ranks("test_sparse_kinds:rank_program", [str(text), str(place)], 2, cpu=True) == (0, "")
    for kind in KINDS: train(of_kind(kind, config(text, place/kind/"alone", rows=4, log_level="error")))
    return place


@pytest.mark.slow
@pytest.mark.parametrize("share", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one(kind, share, place):
    "The curve and the weights; stopped in the middle by one of them and gone on with, to the bit"
    out = place/kind/share
    assert len(timeless(out/"whole")) == STEPS > STOP
    for one, two in zip(timeless(place/kind/"alone"), timeless(out/"whole")):
        for key in ("loss", "grad_norm"): assert two[key] == pytest.approx(one[key], abs=1e-5), (key, one["step"])
    theirs, ours = (AutoModelForCausalLM.from_pretrained(latest_checkpoint(folder)).state_dict() for folder in (place/kind/"alone", out/"whole"))
    for name in theirs: torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-3, msg=lambda m: f"{name}: {m}")
    assert_same_end(out/"halves", out/"whole")


# ---- parts ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_taken_and_held_still(kind, tmp_path, ids):
    "From a checkpoint into a model of other numbers; then only they learn"
    source, model = tiny(kind, 1), tiny(kind, 2)
    source.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    PretrainedLayerLoader(tmp_path, {OWN[kind]: OWN[kind]}).load(model)
    freeze_model_layers(model, {"*": "freeze", OWN[kind]: "train"}, strict=True)
    inside, theirs = OWN[kind].strip("*") + ".", source.state_dict()
    for name, value in model.state_dict().items(): assert torch.equal(value, (theirs if inside in name else before)[name]), name
    model.train()(ids, labels=ids).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if inside in name} and learning


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_from_nothing_and_learn(kind, ids):
    from peft import LoraConfig, get_peft_model
    plain = tiny(kind).eval()
    want = plain(ids).logits
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear"))
    torch.testing.assert_close(adapted(ids).logits, want)
    adapted.train()(input_ids=ids, labels=ids).loss.backward()
    found = [name for name, p in adapted.named_parameters() if "lora_B" in name and p.grad.abs().sum() > 0]
    inside = {"moe": "shared_experts.up_proj", "ultramem": "memory.value_proj", "engram": "engram.value_proj"}[kind]
    assert any(inside in name for name in found) and any("self_attn" in name for name in found)


@pytest.mark.slow
def test_a_step_that_balances_compiles_whole(ids):
    "The load that moves the bias is counted inside the graph, as often as without"
    plain, twin = tiny("moe").train(), tiny("moe").train()
    for way in (plain, torch.compile(twin, fullgraph=True, backend="aot_eager")): way(ids, labels=ids).loss.backward()
    torch._dynamo.reset()
    for a, b in zip(plain.model.layers, twin.model.layers):
        if a.routed: assert torch.equal(a.mlp.gate.load, b.mlp.gate.load) and a.mlp.gate.load.sum() == 2*26


# ---- statistics -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_usage_is_what_was_written_down(kind, ids, tmp_path, capsys):
    "In a summary of a model, and by the command"
    model, seen = tiny(kind).eval(), {}
    if kind == "moe": model.model.layers[1].mlp.gate.register_forward_hook(lambda m, args, out: seen.setdefault(1, []).append(out[1]))
    elif kind == "engram":
        for n, layer in enumerate(model.model.layers): layer.engram.table.register_forward_hook(lambda m, args, out, n=n: seen.setdefault(n, []).append(args[0]))
    for layer in counted_layers(model).values(): layer.collect_usage()
    model(ids)
    layers = usage_summary(model)["layers"]
    assert list(layers) == {"moe": ["1"], "ultramem": ["1"], "engram": ["0 n-grams", "1 n-grams"]}[kind] and all(layer["tokens"] == 26 for layer in layers.values())
    if kind == "moe":
        load = torch.bincount(seen[1][0].flatten(), minlength=6).double()
        assert layers["1"]["load"]["max_violation"] == pytest.approx(float(load.max()/load.mean()) - 1) and layers["1"]["load"]["unused"] == int((load == 0).sum())
    if kind == "engram":
        words = model.model.canonical_ids[ids].tolist()
        pad = int(model.model.canonical_ids[-1])
        for n in (0, 1):
            assert layers[f"{n} n-grams"]["used"] == pytest.approx(len(seen[n][0].unique())/model.model.layers[n].engram.table.weight.shape[0])
            for order, found in enumerate(layers[f"{n} n-grams"]["ngrams"]):
                grams = {}
                for row, at in zip(words, seen[n][0]):
                    filled = [pad]*(order + 1) + row
                    for t in range(len(row)): grams[tuple(filled[t:t + order + 2])] = at[t, 2*order:2*order + 2].tolist()
                rows = list(grams.values())
                shared = sum(sum(other[h] == r[h] for other in rows) > 1 for r in rows for h in (0, 1))
                assert found["ngrams"] == len(grams) and found["shared"] == pytest.approx(shared/(2*len(grams)))
    load_tokenizer(DatasetConfig(tokenizer_name="bytes")).save_pretrained(tmp_path/"model")
    model.save_pretrained(tmp_path/"model")
    (tmp_path/"a.txt").write_text("one and two are three, and three and four are seven. " * 9)
    assert analyze(["usage", str(tmp_path/"model"), "--files", str(tmp_path/"a.txt"), "--pairs", "4", "--output", str(tmp_path/"report")]) == 0
    said, found = capsys.readouterr().out, json.loads((tmp_path/"report"/"usage.json").read_text())["layers"]
    assert {"moe": "experts of layer 1: MaxVio", "ultramem": "unevenness", "engram": "share their row with another"}[kind] in said
    assert [set(layer) & {"load", "ngrams"} for layer in found] == {"moe": [{"load"}], "ultramem": [set()], "engram": [{"ngrams"}]*2}[kind]
    assert {"moe": "MaxVio", "ultramem": "unevenness", "engram": "by chance"}[kind] in (tmp_path/"report"/"usage.html").read_text()


# ---- mistakes ---------------------------------------------------------------------------------------------------------

def test_ngrams_without_their_tokenizers_map_are_refused(tmp_path, text, monkeypatch, capsys):  # noqa: F811
    "By commands in one line, with file and key where a configuration asks for them"
    tokenizer, folder = load_tokenizer(DatasetConfig(tokenizer_name="bytes")), tmp_path/"model"
    tokenizer.save_pretrained(folder)
    model = tiny("engram")
    model.model.canonical_ids.fill_(-1)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="engram_config.layers: .*canonical_ids is empty: peer-train fills it"): load_model(folder)
    assert analyze(["usage", str(folder), "--files", str(text)]) == 2 and "canonical_ids is empty" in capsys.readouterr().err
    model.get_decoder().take_tokens(tokenizer)
    model.model.canonical_ids[40:50] += 1
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="of another tokenizer"): load_model(folder)
    cfg = of_kind("engram", config(text, tmp_path/"run"))
    save_config(cfg, tmp_path/"run.yaml")
    def without_end(config):
        found = load_tokenizer(config)
        found.pad_token = found.eos_token = None
        return found
    monkeypatch.setattr("peer_nb.training.loop.load_tokenizer", without_end)
    capsys.readouterr()
    assert main(["--config", str(tmp_path/"run.yaml")]) == 2
    said = capsys.readouterr().err.strip()
    assert f"{tmp_path/'run.yaml'}: model_config.engram_config.layers: " in said and "padding nor an end-of-text token" in said and "\n" not in said
