"What the analyses claim, against models that are run, processes that are killed, and files that are broken."
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_nb.analysis.any_model import check_closed_form, count_any
from peer_nb.analysis.command import STATE, main
from peer_nb.analysis.expert_usage import Labels, LayerCounter, memory_layers, usage_summary
from peer_nb.analysis.inspection import open_checkpoint, tensor_facts
from peer_nb.analysis.pages import read_analysis, schema_of
from peer_nb.analysis.parameters import count_parameters, layer_rows
from peer_nb.analysis.step_memory import BLOCK, TABLE_STATES, StepMemory, estimate_memory
from peer_nb.analysis.usage_statistics import TOKEN_TYPES, divergence, usage_statistics
from peer_nb.config import DatasetConfig, apply_overrides, load_config
from peer_nb.files import UserError, seal_folder
from peer_nb.data.corpora import load_tokenizer
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM

PROGRAM = [sys.executable, "-c", "import sys; from peer_nb.analysis.command import main; sys.exit(main())"]
TEXT = "The 3 quick foxes jump over 12 lazy dogs; x += 4 * (y - 7)!\n"


def small(**options) -> PeerMLAForCausalLM:
    torch.manual_seed(0)
    peer = dict(num_experts=256, product_key_dim=[16, 16], num_heads=2, num_experts_per_tok=4, query_dim=16, query_norm="batch") | options.pop("peer_config", {})
    return PeerMLAForCausalLM(PeerMLAConfig(**dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=260, max_position_embeddings=64, peer_start_layer=1,
        initializer_range=.3, mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=8), peer_config=peer) | options)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A checkpoint of ours, a Llama, and a text"
    from transformers import LlamaConfig, LlamaForCausalLM
    root, tokenizer = tmp_path_factory.mktemp("analysis"), load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    small().save_pretrained(root/"ours")
    LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)).save_pretrained(root/"llama")
    for name in ("ours", "llama"): tokenizer.save_pretrained(root/name)
    for n in range(6): (root/f"text{n}.txt").write_text(TEXT * (n + 3))
    return root


@settings(max_examples=150, deadline=None)
@given(uses=st.lists(st.integers(0, 50), min_size=1, max_size=60), threshold=st.floats(1, 9))
def test_statistics_of_any_counts(uses, threshold):
    "Against definitions written out, and bounds that hold for any list"
    found, n, total = usage_statistics(np.array(uses), threshold), len(uses), sum(uses)
    assert found["used"] == sum(u > 0 for u in uses) / n
    if not total: return
    shares = sorted((u / total for u in uses), reverse=True)
    assert found["unevenness"] == pytest.approx(np.log(n) + sum(z * np.log(z) for z in shares if z), abs=1e-9)
    assert found["gini"] == pytest.approx(sum(abs(a - b) for a in shares for b in shares) / (2 * n), abs=1e-9)
    assert 1 <= found["top50"] <= found["top90"] <= found["top99"] <= sum(u > 0 for u in uses)
    assert found["hot"] == sum(z * n > threshold for z in shares) or any(abs(z*n - threshold) < 1e-9 for z in shares)
    assert -1e-9 <= found["unevenness"] <= np.log(n) + 1e-9 and found["hottest"] >= 1 - 1e-9
    shuffled = usage_statistics(np.random.default_rng(0).permutation(uses) * 3.0, threshold)
    assert {k: pytest.approx(v, abs=1e-9) for k, v in shuffled.items() if k != "hot"} == {k: v for k, v in found.items() if k != "hot"}


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=20))
def test_divergence_is_a_bounded_symmetric_distance(rows):
    a, b = np.array(rows).T
    if not a.sum() or not b.sum(): return
    assert divergence(a, b) == pytest.approx(divergence(b, a)) and 0 <= divergence(a, b) <= 1
    assert divergence(a, a * 7) == pytest.approx(0, abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(layers=st.integers(1, 4), kind=st.sampled_from(["peer", "memory_plus"]), tied=st.booleans(), shared=st.booleans(), h=st.integers(1, 3), keys=st.booleans(), q=st.sampled_from([None, 5]),
       norm=st.sampled_from(["layer", "batch"]), dims=st.sampled_from([[4, 4], [2, 3, 5], [12]]), chosen=st.sets(st.integers(0, 3)))
def test_closed_form_equals_the_model_for_any_configuration(layers, kind, tied, shared, h, keys, q, norm, dims, chosen):
    peer = dict(num_experts=int(np.prod(dims)), product_key_dim=dims, num_heads=2, num_experts_per_tok=3, query_dim=12, expert_hidden_size=h, shared_keys=keys, query_norm=norm)
    options = dict(hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=10, vocab_size=30, max_position_embeddings=16, memory_kind=kind, tie_word_embeddings=tied,
                   share_memory=shared, memory_layers=sorted(c for c in chosen if c < layers), peer_config=peer,
                   mla_config=dict(q_lora_rank=q, kv_lora_rank=4, qk_rope_head_dim=2, v_head_dim=3, qk_nope_head_dim=4))
    assert check_closed_form(options)["total"] == count_parameters(options).total == sum(row["total"] for row in layer_rows(options))


def test_the_guides_default_is_counted_from_its_file(capsys, tmp_path):
    assert main(["parameters", "configs/config.yaml", "--check", "--output", str(tmp_path)]) == 0
    found = read_analysis(tmp_path/"parameters.json")[1]
    assert found["total"] == found["checked"]["total"] == 16_329_211_648
    assert set(found["step_memory"]) == {"dense", "sparse", "consumed"}
    assert "16,329,211,648" in (tmp_path/"parameters.html").read_text() and "16,329,211,648" in capsys.readouterr().out


def test_eight_bit_states_take_what_is_said():
    "torchao's Adam holds two codes of a byte for each entry and a float32 scale for each block of them"
    subclass = pytest.importorskip("torchao.optim.subclass_8bit", exc_type=ImportError)
    moments = [subclass.OptimState8bit.zeros((2048, 64), signed, BLOCK) for signed in (True, False)]
    held = sum(part.nbytes for state in moments for part in (state.codes, state.scale))
    assert held == TABLE_STATES["consumed"] * 2048 * 64


def test_memory_of_a_step_follows_its_parts():
    base = load_config("configs/config.yaml")
    peak = lambda **changes: estimate_memory(apply_overrides(base, {k.replace("__", "."): v for k, v in changes.items()})).peak
    assert peak(train_config__per_device_train_batch_size=8) < peak()
    assert peak(train_config__gradient_checkpointing=True) < peak()
    assert peak(model_config__loss_chunk_size=1024) < peak()
    assert peak(model_config__share_memory=True) < peak() / 3
    assert estimate_memory(base, "consumed").peak < estimate_memory(base, "dense").peak
    small_batch = apply_overrides(base, {"train_config.per_device_train_batch_size": 1, "dataset_config.max_seq_length": 128, "train_config.gradient_accumulation_steps": 1})
    assert estimate_memory(small_batch, "sparse").gradients < estimate_memory(small_batch, "dense").gradients / 20
    for step in (estimate_memory(base, kind) for kind in TABLE_STATES):
        parts = (step.weights, step.half_copies, step.optimizer, step.gradients, step.activations)
        assert max(parts) < step.peak <= sum(parts) and set(step.to_dict()) == {f.name for f in fields(StepMemory)}


@pytest.mark.slow
def test_what_a_million_rows_take():
    "Counters of a layer of the guide's size, filled from many batches, in this process's memory"
    code = """
import resource, torch
from peer_nb.analysis.expert_usage import LayerCounter, Labels
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
class Layer: num_experts, num_heads, sizes, keys = 1024**2, 8, [1024, 1024], torch.empty(0)
def batch(counter):
    counter.labels.classes = dict(types=torch.randint(0, 6, (512,)), positions=torch.randint(0, 8, (512,)))
    counter.add(torch.rand(512, 8, 16).softmax(-1), torch.randint(0, 1024**2, (512, 8, 16)))
batch(LayerCounter(Layer, Labels(), dict(types=6, positions=8)))
before = peak()
layers = [LayerCounter(Layer, Labels(), dict(types=6, positions=8)) for _ in range(3)]
for _ in range(2):
    for layer in layers: batch(layer)
print(peak() - before, sum(int(l.counts.sum()) for l in layers))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[1]) == 3 * 2 * 512 * 128
    assert int(out[0]) < 3 * 60e6       # so ten layers stay below 600 MB


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "relu"])
def test_usage_of_a_run_equals_indices_that_were_written_down(folder, score):
    "Any score function: by weight and by count, from the layers' own routing of the same text, in float64"
    model = small(peer_config=dict(score=score))
    layer, labels = memory_layers(model)[1], Labels()
    counter, x = LayerCounter(layer, labels, {}), torch.randn(70, 32)
    with torch.no_grad(): weights, index = layer.route(x)
    for part in (slice(0, 31), slice(31, 70)): counter.add(weights[part], index[part])
    assert counter.tokens == 70 and int(counter.counts.sum()) == 70 * 8
    by_hand = np.zeros(256)
    for w, i in zip(weights.double().flatten().tolist(), index.flatten().tolist()): by_hand[i] += w
    np.testing.assert_allclose(counter.weights.numpy(), by_hand, rtol=1e-12)


def test_summary_of_layers_that_did_nothing_yet():
    model = small()
    for layer in memory_layers(model).values(): layer.collect_usage()
    summary = usage_summary(model)
    assert summary["used"] == 0 and json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_usage_over_files(folder, capsys):
    jsonschema = pytest.importorskip("jsonschema")
    files = [str(folder/f"text{n}.txt") for n in range(3)]
    assert main(["usage", str(folder/"ours"), "--files", *files, "--window", "40", "--output", str(folder/"use")]) == 0
    found = read_analysis(folder/"use"/"usage.json")[1]
    jsonschema.validate(found, schema_of("usage"))
    assert found["tokens"] == sum(os.path.getsize(f) for f in files) and found["documents"] == 3 and found["complete"]
    text = TEXT * 12
    kinds = {t["name"]: t["tokens"] for t in found["layers"][0]["types"]}
    assert kinds["digits"] == sum(c.isdigit() for c in text) and kinds["words"] == sum(c.isalpha() for c in text) and kinds["space"] == sum(c.isspace() for c in text)
    assert set(kinds) <= set(TOKEN_TYPES) and sum(kinds.values()) == found["tokens"]
    for layer in found["layers"]: assert sum(p["tokens"] for p in layer["positions"]) == found["tokens"] and layer["retrieved_per_token"] == 8
    assert "hottest" in capsys.readouterr().out


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_to_the_same_counts(folder, tmp_path, how, capsys):
    "Ctrl-C leaves a partial page; kill -9 leaves the last state; both are continued to what an undisturbed run finds"
    files = [str(folder/f"text{n}.txt") for n in range(6)]
    words = ["usage", str(folder/"ours"), "--files", *files, "--window", "32", "--batch-size", "2", "--pairs", "4", "--output"]
    held_up = ("import sys; import peer_nb.analysis.command as c; c.SAVE_SECONDS = 0; import peer_nb.analysis.expert_usage as e; run, groups = e.UsageRun.run_pieces, []\n"
            "def waiting(self, *a):\n    run(self, *a); print('group', flush=True); groups.append(1)\n    if len(groups) == 3: sys.stdin.read()\n"
            "e.UsageRun.run_pieces = waiting; sys.exit(c.main())")
    process = subprocess.Popen([sys.executable, "-c", held_up, *words, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    seen = 0
    for line in process.stdout:
        seen += line == "group\n"
        if seen == 3: break
    process.send_signal(how)
    process.stdin.close()
    process.stdout.read()
    assert process.wait(600) == (130 if how == signal.SIGINT else -signal.SIGKILL) and (tmp_path/STATE).exists()
    if how == signal.SIGINT:
        partial = read_analysis(tmp_path/"usage.json")[1]
        assert not partial["complete"] and 0 < partial["documents"] < 6 and "Partial" in (tmp_path/"usage.html").read_text()
    assert main([*words, str(tmp_path)]) == 0
    assert "going on after" in capsys.readouterr().out and not (tmp_path/STATE).exists()
    assert main([*words, str(tmp_path/"whole")]) == 0
    assert read_analysis(tmp_path/"usage.json") == read_analysis(tmp_path/"whole"/"usage.json")


def test_a_state_of_another_measurement_is_refused(folder, tmp_path, capsys):
    words = ["usage", str(folder/"ours"), "--files", str(folder/"text0.txt"), "--output", str(tmp_path)]
    np.savez(tmp_path/STATE, identity=np.array("another"))
    assert main(words) == 2 and "another measurement" in capsys.readouterr().err
    (tmp_path/STATE).write_bytes(b"torn")
    assert main(words) == 2 and "remove it" in capsys.readouterr().err


def test_two_measurements_do_not_share_a_folder(folder, tmp_path, capsys):
    words = ["usage", str(folder/"ours"), "--files", str(folder/"text0.txt"), "--output", str(tmp_path)]
    begin = "import sys; from peer_nb.files import folder_lock\nwith folder_lock(sys.argv[1], name='.usage.lock'): print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", begin, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert main(words) == 2 and f"in use by process {other.pid}" in capsys.readouterr().err
        assert not (tmp_path/"usage.json").exists()
        other.stdin.close()
    assert main(words) == 0 and (tmp_path/"usage.json").exists()


@pytest.mark.parametrize("kind, config, cache", [
    pytest.param("bloom", dict(hidden_size=16, n_layer=2, n_head=2), 64, marks=pytest.mark.slow), ("mpt", dict(d_model=16, n_layers=2, n_heads=2, max_seq_len=64), 64), ("gpt2", dict(n_embd=16, n_layer=2, n_head=2, n_positions=64), 64),
    pytest.param("mamba", dict(hidden_size=16, num_hidden_layers=2, state_size=4), None, marks=pytest.mark.slow), ("mamba2", dict(hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=1), None),
    ("mixtral", dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64), None)])
def test_models_of_others_are_counted_and_inspected(kind, config, cache, tmp_path, capsys):
    "As transformers writes them; parameters as torch counts them; no context beyond what the model reads"
    from transformers import AutoConfig, AutoModelForCausalLM
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=257, **config))
    model.save_pretrained(tmp_path/"model")
    assert main(["parameters", str(tmp_path/"model"), "--output", str(tmp_path)]) == 0
    found = read_analysis(tmp_path/"parameters.json")[1]
    assert (found["total"], found["cache_numbers_per_token"]) == (model.num_parameters(), cache)
    assert main(["checkpoint", str(tmp_path/"model"), "--output", str(tmp_path)]) == 0
    assert read_analysis(tmp_path/"checkpoint.json")[1]["misfits"] == []
    if kind in ("gpt2", "mpt", "mixtral"): assert main(["parameters", str(tmp_path/"model"), "--context", "65"]) == 2 and "reads 64 tokens" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told(folder, tmp_path, capsys):
    "By the seal that a checkpoint of ours has, in every command that reads weights"
    shutil.copytree(folder/"ours", tmp_path/"ours")
    (tmp_path/"ours"/"trainer_state").mkdir(exist_ok=True)
    seal_folder(tmp_path/"ours")
    assert main(["checkpoint", str(tmp_path/"ours")]) == 0
    weights = next((tmp_path/"ours").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    assert main(["checkpoint", str(tmp_path/"ours"), "--output", str(tmp_path)]) == 2 and f"{weights.name} was changed" in capsys.readouterr().err
    assert not read_analysis(tmp_path/"checkpoint.json")[1]["complete"]
    assert main(["compare", str(folder/"ours"), str(tmp_path/"ours")]) == 0 and f"{weights.name} was changed" in capsys.readouterr().out
    assert main(["usage", str(tmp_path/"ours"), "--files", str(folder/"text0.txt")]) == 2 and f"{weights.name} was changed" in capsys.readouterr().err


def test_a_llama_is_counted_and_inspected_but_has_no_usage(folder, tmp_path, capsys):
    from transformers import LlamaForCausalLM
    llama = str(folder/"llama")
    assert main(["parameters", llama, "--output", str(tmp_path)]) == main(["checkpoint", llama, "--output", str(tmp_path)]) == 0
    numbers = LlamaForCausalLM.from_pretrained(llama).num_parameters()
    assert read_analysis(tmp_path/"parameters.json")[1]["total"] == read_analysis(tmp_path/"checkpoint.json")[1]["numbers"] == numbers
    capsys.readouterr()
    assert main(["usage", llama]) == 2 and "no memory layers" in capsys.readouterr().err


def test_flops_of_foreign_models_grow_with_the_context_as_attention_does():
    config = dict(model_type="llama", vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=4096)
    one, two, three = (count_any(config, context=n)["flops_per_token"] for n in (16, 32, 48))
    assert two - one == three - two == 2 * 4 * 16 * 16      # layers, scores and sums, width, tokens more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_facts_of_a_tensor_in_many_pieces(tmp_path, monkeypatch, dtype):
    from safetensors.torch import save_file
    monkeypatch.setattr("peer_nb.analysis.inspection.PIECE", 100)
    values = torch.randn(37, 3, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[3, 1, 2], values[36, 2, 4] = float("nan"), float("-inf")
    save_file({"w": values}, tmp_path/"w.safetensors")
    found, finite = tensor_facts(open_checkpoint(tmp_path/"w.safetensors").tensors["w"]), values.double()[values.isfinite()].numpy()
    assert (found["nan"], found["infinite"], found["numbers"]) == (1, 1, 555)
    np.testing.assert_allclose([found["norm"], found["mean"], found["largest"]], [np.linalg.norm(finite), finite.mean(), np.abs(finite).max()], rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 2000), flip=st.integers(0, 255), place=st.integers(0, 500))
def test_no_broken_file_gets_through_or_crashes(tmp_path_factory, cut, flip, place):
    "Cut anywhere, or a byte of the header changed: an error that says so, or a file that is still consistent"
    from safetensors.torch import save
    whole = bytearray(save({"a.weight": torch.zeros(7, 5), "b": torch.ones(3)}))
    path = tmp_path_factory.mktemp("broken")/"model.safetensors"
    if cut < len(whole):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="model.safetensors"): open_checkpoint(path)
    whole[place % len(whole)] = flip
    path.write_bytes(whole)
    try: tensors = open_checkpoint(path).tensors
    except UserError as e: assert "model.safetensors" in str(e)
    else: assert sum(t.bytes for t in tensors.values()) <= len(whole)


def test_help_is_there_at_once():
    out = subprocess.run([*PROGRAM, "usage", "--help"], capture_output=True, text=True)
    assert out.returncode == 0 and "--max-tokens" in out.stdout and "peer-analyze usage output/checkpoint-1000" in out.stdout
