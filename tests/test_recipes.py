"""The recipes of nbs/where_to_add.ipynb do what the page says: each is applied as a reader would."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from peer_nb.running.command import main

ROOT = Path(__file__).parent.parent
RECIPES = ROOT/"tests"/"recipes"


def notebook(source: str) -> dict:
    "A notebook from cells that begin with # %%, as editors write them"
    cells = []
    for part in re.split(r"^# %%", source, flags=re.M)[1:]:
        head, _, body = part.partition("\n")
        tags = re.findall(r'tags=\["(\w+)"\]', head)
        if "[markdown]" in head: cells.append(dict(cell_type="markdown", id=f"c{len(cells)}", metadata={}, source=re.sub(r"^# ?", "", body, flags=re.M)))
        else: cells.append(dict(cell_type="code", id=f"c{len(cells)}", metadata=dict(tags=tags), source=body, outputs=[], execution_count=None))
    kernel = dict(display_name="python3", language="python", name="python3")
    return dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)


def patched(tmp_path: Path, name: str) -> Path:
    "A copy of the package with a recipe's diff applied"
    shutil.copytree(ROOT/"peer_nb", tmp_path/"peer_nb", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(["git", "apply", "-C1", "--unsafe-paths", str(RECIPES/name)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{name} no longer fits the package: {done.stderr}"
    return tmp_path


def in_copy(copy: Path, code: str) -> str:
    "What a program prints that imports the copy"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_axis_is_planned(tmp_path, capsys):
    for file in ("demo.yaml", "demo_datasets.yaml"): shutil.copy(ROOT/"configs"/file, tmp_path)
    shutil.copy(RECIPES/"depth.yaml", tmp_path)
    assert main(["plan", "--study", str(tmp_path/"depth.yaml"), "--gpus", "0", "--output-dir", str(tmp_path/"out")]) == 0
    said = capsys.readouterr().out
    assert "6 layers × 96" in said and "6 runs" in said


def test_a_task_is_trained_masked_and_planned(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(RECIPES)!r})\n" + '''
from colours import TASK
from peer_nb.config import config_from_dict, load_config, to_dict
from peer_nb.data.corpora import load_tokenizer
from peer_nb.data.packing import training_batches
from peer_nb.study.plan import measured
entry = dict(name="things", task="colour_table", mask="colour", task_arguments=dict(num_things=8))
config = config_from_dict(dict(train_config=dict(max_tokens=512, per_device_train_batch_size=2, gradient_accumulation_steps=1),
                               dataset_config=dict(datasets=[entry], tokenizer_name="bytes", max_seq_length=64)))
tokenizer = load_tokenizer(config.dataset_config)
batch = next(iter(training_batches(config, tokenizer)))
trained = "".join(tokenizer.decode([t]) for row, labels in zip(batch["input_ids"], batch["labels"]) for t, l in zip(row, labels) if l != -100)
print(trained)
print(measured(config, "things/known/exact_match"), measured(config, "things/test/exact_match"))
print(len(TASK.texts("trained", num_things=8)))
'''
    trained, planned, rows = in_copy(tmp_path, code).strip().splitlines()[-3:]
    assert re.search("red|green|blue|black|white|brown|pink|grey", trained) and "thing" not in trained
    assert planned == "True False" and int(rows) == 160


def test_a_memory_layer_is_its_twin(tmp_path):
    said = in_copy(patched(tmp_path, "memory_layer.diff"), '''
import torch
from peer_nb.config import config_from_dict
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.models.peer import MEMORY_KINDS
config_from_dict(dict(model_config=dict(memory_kind="squashed")))
torch.manual_seed(0)
layer = MEMORY_KINDS["squashed"](16, num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=8).double()
x = torch.randn(5, 16, dtype=torch.float64)
weights, index = layer.route(x)
twin = torch.einsum("tp,tpd->td", weights.flatten(1), layer.values.weight[index.flatten(1)]).tanh()
print((layer(x) - twin).abs().max().item() < 1e-12)
model = PeerMLAForCausalLM(PeerMLAConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64, peer_start_layer=1,
    memory_kind="squashed", peer_config=dict(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=8),
    mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)))
ids = torch.arange(12)[None]
model(input_ids=ids, labels=ids).loss.backward()
print(type(model.model.layers[1].memory).__name__, model.model.layers[1].memory.values.weight.grad.abs().sum().item() > 0)
''')
    assert said.split() == ["True", "SquashedMemory", "True"]


def test_an_analysis_is_a_subcommand(tmp_path):
    copy = patched(tmp_path, "analysis.diff")
    said = in_copy(copy, '''
import torch
from peer_nb.analysis.command import main
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
model = PeerMLAForCausalLM(PeerMLAConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64, peer_start_layer=0,
    memory_kind="pkm", peer_config=dict(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=8),
    mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)))
with torch.no_grad(): model.model.layers[0].memory.values.weight[17] = 9.0
model.save_pretrained("checkpoint")
assert main(["loudest", "checkpoint", "--top", "2"]) == 0
''')
    first = said.strip().splitlines()[1].split()
    assert first == ["model.layers.0.memory.values.weight", "17", f"{9*32**.5:.4f}"]


def test_a_template_runs_in_a_study(tmp_path):
    (tmp_path/"coverage.ipynb").write_text(json.dumps(notebook((RECIPES/"coverage.py").read_text())))
    peer = dict(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16)
    model = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=260, peer_start_layer=1,
                 mla_config=dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8))
    (tmp_path/"words.txt").write_text("".join(f"some words, {n}\n\n" for n in range(200)))
    data = dict(datasets=[dict(name="words", path=str(tmp_path/"words.txt"))], tokenizer_name="bytes", max_seq_length=64)
    (tmp_path/"base.yaml").write_text(yaml.safe_dump(dict(model_config=model | dict(peer_config=peer), dataset_config=data, train_config=dict(max_tokens=4096))))
    study = dict(name="coverage", base_config="base.yaml", notebook="coverage.ipynb", seeds=[1], primary=dict(metric="memory/coverage", direction="maximize"),
                 axes=dict(heads={"2": {}, "1": {"model_config.peer_config.num_heads": 1}}))
    (tmp_path/"study.yaml").write_text(yaml.safe_dump(study))
    done = subprocess.run([sys.executable, "-c", "import sys; from peer_nb.running.command import main; sys.exit(main())", "--study", str(tmp_path/"study.yaml"), "--gpus", "0",
                           "--output-dir", str(tmp_path/"out")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(p.read_text())["metrics"]["memory/coverage"] for p in sorted((tmp_path/"out").glob("*/runs/*/result.json"))]
    assert len(results) == 2 and all(0 < share <= 1 for share in results)


def test_a_benchmark_is_asked(tmp_path):
    from peer_nb.evaluation.openai_evals import eval_rows, find_eval
    rows = eval_rows(find_eval("units", RECIPES/"benchmark"))
    assert [r["ideal"] for r in rows] in ([["1024"], ["8"]], ["1024", "8"]) and "kibibyte" in rows[0]["prompt"]


def test_the_page_shows_every_recipe():
    page = (ROOT/"nbs"/"where_to_add.ipynb").read_text()
    files = [p.relative_to(RECIPES).as_posix() for p in RECIPES.rglob("*.*") if "__pycache__" not in p.parts]
    assert [f for f in files if f not in page] == []
