"Every command that the documentation shows is typed here: run where that is cheap, planned or parsed where it is not."
import configparser
import importlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peer_nb import cli
from peer_nb.data import corpora
from peer_nb.running import local
from peer_nb.training import loop
from peer_nb.training.optim import check_table_gradient, planned_steps
from test_training import config, one_thread, text   # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[1]
SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT/"settings.ini")
ENTRIES = dict(word.split("=") for word in SETTINGS["DEFAULT"]["console_scripts"].split())
ELSEWHERE = {   # beginning of a command: why it is not tried here
    "peer-ablate --study configs/adapters/": "begins with a base that is made on the spot: test_adapter_studies reads them",
    "make ": "the environment itself; CI runs it",
    "peer-train --config configs/experiments/": "studies of one axis, with options of their own: test_one_axis",
    **dict.fromkeys(["WANDB_PROJECT=", "peer-train --config FILE", "peer-ablate --study FILE", "for config in"], "the same"),
    ".venv/bin/": "tools of others, in the environment that make has made",
    "peer-ablate plan --study depth.yaml": "test_recipes plans it", "peer-ablate --study depth.yaml": "test_recipes plans it",
    "peer-ablate --base-config configs/demo.yaml --axes expert_setup selection_heads --notebook coverage.ipynb": "test_recipes plans it",
    "peer-eval benchmark CHECKPOINT units": "test_recipes asks it",
    "peer-ablate --study configs/bridge/mistral_llama/": "items of the hub: test_bridge_study plans it"}
PARSED = {   # beginning of a command: why it is parsed and not run
    "peer-analyze ablate output/digit_lookup/checkpoint-800 digits --all": "all that there is of a model: test_interventions",
    "peer-ablate --resume": "continues a study: test_ablation", "peer-ablate watch": "watches a study: test_running",
    "peer-eval perplexity gpt2": "a model and a set of the hub", "peer-eval benchmark": "questions of the hub: test_benchmarks",
    "peer-train --merge": "a checkpoint with adapters: test_adapters", "torchrun": "eight processes: test_parallel", "peer-analyze usage output/checkpoint-1000 --mix": "a set of the hub",
    "peer-analyze intervene output/checkpoint-1000 data/digit_lookup --edits": "a person's file: test_edits",
    "peer-analyze routing": "real problems, or prompts of their own: test_routing", "peer-analyze keys": "a person's facts: test_routing",
    "peer-analyze checkpoint output/checkpoint-1000 --check": "a configuration that is another model's: test_routing",
    "peer-analyze convert": "a person's dense model: test_convert", "peer-analyze attention": "reads attention of a text: test_attention", "peer-analyze losses": "curves of a person's runs: test_repair", "peer-analyze explain": "a person's results: test_repair",
    "peer-analyze salvage": "a person's broken file: test_repair", "peer-analyze checkpoint output/checkpoint-1000 --why": "a person's configuration: test_repair", "peer-analyze checkpoint somebody.safetensors": "the same",
    "peer-analyze swap": "exchanges facts that the model knows: test_interventions",
    "peer-bridge train": "makes two models first: test_bridge", "peer-bridge evaluate": "asks a run that is finished: test_bridge_evaluation", "peer-bridge tables": "studies that have run: test_bridge_study"}


def pages() -> dict[str, list[str]]:
    "File: its prose, in pieces"
    found = {name: [(ROOT/name).read_text()] for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")}
    for page in sorted((ROOT/"nbs").rglob("*.ipynb")):
        cells = json.loads(page.read_text())["cells"]
        found[str(page.relative_to(ROOT))] = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return found


def main_of(name: str): return getattr(importlib.import_module(ENTRIES[name].split(":")[0]), "main")


def commands() -> dict[str, str]:
    "Command line as it stands in a page, in a configuration's comment or behind --help: where"
    fences = [(name, *fence) for name, pieces in pages().items() for piece in pieces for fence in re.findall(r"^```(\w*)\n(.*?)^```", piece, re.M | re.S)]
    blocks = [(name, block) for name, language, block in fences if language in ("bash", "sh", "shell", "")]
    for file in sorted((ROOT/"configs").rglob("*.yaml")): blocks.append((str(file.relative_to(ROOT)), "\n".join(re.findall(r"^#\s+((?:peer-|make ).*)$", file.read_text(), re.M))))
    for source in sorted((ROOT/"peer_nb").rglob("*.py")):   # the examples that --help ends with
        blocks.append((str(source.relative_to(ROOT)), "\n".join(re.findall(r"^    (peer-\w+ (?!\|).*?)(?:\"\"\")?$", source.read_text(), re.M))))
    found = {}
    for name, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"): found.setdefault(line.strip(), name)
    return found


COMMANDS = commands()


def beginning(line: str, known: dict) -> str | None:
    return next((first for first in known if line.startswith(first)), None)


def test_all_kinds_of_places_are_read():
    assert {"README.md", "CONTRIBUTING.md", "nbs/running/03_slurm.ipynb", "configs/memory/slurm/two_hop.yaml", "peer_nb/training/loop.py"} <= {*COMMANDS.values()} and len(COMMANDS) > 50
    for first in ELSEWHERE | PARSED: assert any(line.startswith(first) for line in COMMANDS), f"no page has {first!r}"


@pytest.fixture(scope="module")
def place(text, tmp_path_factory) -> Path:
    "A checkout's configurations, and what the commands before would have left: checkpoints, data"
    place = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT/"configs", place/"configs")
    shutil.copy(ROOT/"configs"/"small.yaml", place/"my_model.yaml")
    for name in ("my_run.yaml", "run.yaml"): shutil.copy(ROOT/"configs"/"small.yaml", place/name)
    asked = config(text, place/"output"/"small")
    asked.model_config.max_position_embeddings = 1024
    trained = loop.train(asked).checkpoint
    for name in ("checkpoint-1000", "digit_lookup/checkpoint-800", "checkpoint-2000"): shutil.copytree(trained, place/"output"/name)
    for name in "ab": (place/f"{name}.txt").write_text("Three plus four is seven.\n" * 40)
    for folder, task, *words in (("digits", "digit_lookup", "--num-pairs=20", "--num-known=10", "--num-novel=10"), ("data/synthetic_qa", "synthetic_qa", "--num-pairs=400"),
                                 ("data/digit_lookup", "digit_lookup", "--num-pairs=20", "--num-known=10", "--num-novel=10")):
        (place/folder).parent.mkdir(exist_ok=True)
        assert main_of("peer-data")([task, *words, "--output-dir", str(place/folder)]) == 0
    assert main_of("peer-analyze")(["usage", str(trained), "--files", str(place/"a.txt"), "--output", str(place/"report")]) == 0
    return place


def words_of(line: str, place: Path) -> list[str]:
    "What a shell makes of a line"
    shown = subprocess.run(["bash", "-c", "show() { printf '%s\\0' \"$@\"; }; which() { echo \"$1\"; }; show " + line], cwd=place, capture_output=True, text=True, check=True)
    return shown.stdout.split("\0")[:-1]


def parsed(name: str, words: list[str]):
    "A command line, sorted into the parameters of its function; refused where it does not fit"
    done = []
    run, cli._run = cli._run, lambda prog, commands, default, doc, words: done.append((prog, commands, default, words)) or 0
    try: main_of(name)(words)
    finally: cli._run = run
    prog, functions, default, words = done[0]
    if not callable(functions): _, functions, words = cli._choose(prog, functions, default, words)
    return functions, cli.parse(functions, words)


class Planned(BaseException): "Training would begin"


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_accepted_as_typed(line, place, monkeypatch, capsys):
    if beginning(line, ELSEWHERE): return
    monkeypatch.chdir(place)
    monkeypatch.setattr(local, "gpu_devices", lambda: list("0123"))
    monkeypatch.setattr(corpora, "hub_revision", lambda name, kind: "0"*40)   # a hub that answers
    words = words_of(line, place)
    if words[0] == "torchrun": words = next(words[n:] for n, word in enumerate(words) if Path(word).name in ENTRIES or word in ENTRIES)
    name, words = Path(words[0]).name, words[1:]
    assert name in ENTRIES, f"{COMMANDS[line]}: no such command"
    asked = []
    def train(cfg, **keys):
        asked.append(cfg)
        raise Planned
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(loop, "train_in_processes", lambda cfg, *more, **keys: asked.append(cfg) or (0, ""))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    if beginning(line, PARSED): parsed(name, words); return
    if name == "peer-ablate" and words[0] != "plan": words.append("--dry-run")
    if name == "peer-data": shutil.rmtree(place/words[-1], ignore_errors=True)   # what the fixture has made for the others
    try: code = main_of(name)(words)
    except Planned: code = 0
    assert code == 0, f"{COMMANDS[line]}: {capsys.readouterr().err}"
    for cfg in asked:
        check_table_gradient(cfg)
        planned_steps(cfg, tokens_per_epoch=10**6)


def test_options_in_running_text_exist():
    "`peer-eval recall CHECKPOINT DATA --logits` in a sentence: command, subcommand and options are there"
    for page, pieces in pages().items():
        for piece in pieces:
            for line in re.findall(r"`(peer-[^`]+)`", re.sub(r"^```.*?^```", "", piece, flags=re.M | re.S)):
                name, *words = line.split()
                if name not in ENTRIES: continue
                found = []
                run, cli._run = cli._run, lambda prog, commands, default, doc, words: found.append((commands, default)) or 0
                mode = words[:1] if words[:1] == ["--merge"] else []   # another function of the same command
                words = words[len(mode):]
                try: main_of(name)(mode)
                finally: cli._run = run
                functions, default = found[0]
                if callable(functions): functions, default = {"": functions}, ""
                subs = {sub.replace("_", "-"): sub for sub in functions}
                named = [subs[word.replace("_", "-")] for word in words if word.replace("_", "-") in subs] or [default or ""]
                plain = [word for word in words if re.fullmatch(r"[a-z][a-z_-]+", word)]
                assert named != [""] or "" in functions or not plain, f"{page}: {line}: which command is meant?"
                known = {p.option for sub in named if sub in functions for p in cli.parameters(functions[sub])} or {p.option for f in functions.values() for p in cli.parameters(f)}
                for word in words:
                    option = word.split("=")[0].replace("_", "-")
                    if option.startswith("--") and "." not in option: assert option in known | {"--help", "--version", "--lora-rank"}, f"{page}: {line}: {option}"


def test_python_of_the_readme_runs_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT/"README.md").read_text(), re.M | re.S): exec(block, space)
    assert space["out"].logits.shape == (1, 12, 256)


@pytest.mark.parametrize("line, output", [("peer-eval recall output/digit_lookup/checkpoint-800 digits", "recalled"), ("peer-eval perplexity output/checkpoint-1000", "scored/scores.json"),
                                          ("peer-analyze parameters configs/small.yaml", "counted"), ("peer-analyze usage output/checkpoint-1000", "used"), ("peer-analyze checkpoint output/checkpoint-1000", "seen")])
def test_what_measures_leaves_a_file_and_a_page(line, output, place, monkeypatch):
    "As the front page says"
    monkeypatch.chdir(place)
    (place/"scored").mkdir(exist_ok=True)
    name, *words = line.split()
    assert main_of(name)([*words, "--output", output]) == 0
    folder = (place/output).parent if output.endswith(".json") else place/output
    assert {".json", ".html"} <= {path.suffix for path in folder.iterdir()}


# ---- numbers that cannot be meant ---------------------------------------------------------------------------------------

LEAST = {   # command: its shortest form
    "peer-ablate run": ["--base-config", "configs/small.yaml", "--axes", "expert_setup", "--dry-run"], "peer-ablate plan": ["--base-config", "configs/small.yaml", "--axes", "expert_setup"],
    "peer-ablate watch": ["nowhere"], "peer-train": ["--config", "configs/small.yaml"], "peer-bridge evaluate": ["output/needle"], "peer-eval perplexity": ["output/checkpoint-1000"], "peer-eval benchmark": ["output/checkpoint-1000", "hellaswag"],
    "peer-eval recall": ["output/checkpoint-1000", "digits"], **{f"peer-data {task}": ["--output-dir", "new", "--force"] for task in ("synthetic_qa", "digit_lookup", "two_hop", "hashhop")},
    "peer-data tokenization": ["digits"], "peer-analyze parameters": ["configs/small.yaml"], "peer-analyze usage": ["output/checkpoint-1000"],
    "peer-analyze convert": ["output/checkpoint-1000", "new"], "peer-analyze losses": ["nowhere"],
    **{f"peer-analyze {name}": ["output/checkpoint-1000", "data/digit_lookup"] for name in ("ablate", "swap", "retrievals", "attention", "keys", "routing")}, "peer-analyze rewrite": ["output/checkpoint-1000", "data/digit_lookup", "--aim", "x", "--want", "1"], "peer-analyze intervene": ["output/checkpoint-1000", "data/digit_lookup", "--drop", "0"]}
ZERO = {"--gpus": "the CPU", "--seed": "a seed", "--seeds": "a seed", "--layer": "the first", "--layers": "the first", "--pairs": "don't look", "--threshold": "all are hot", "--fewshot": "no examples", "--top": "no list",
        "--num-novel": "none", "--num-known": "none", "--num-novel-ood": "none", "--num-eval": "none", "--num-samples": "none", "--val-fraction": "none", "--test-fraction": "none", "--resamples": "no interval",
        "--drop": "a row", "--keep": "nothing is kept"}
EDITS = {"--swap", "--replace", "--in-place-of", "--inject", "--weight", "--pattern", "--head", "--layer"}   # of intervene, checked together: test_edits


def numbers() -> list[tuple[str, str, list[str]]]:
    "Command, option, value"
    found = []
    for name in ENTRIES:
        asked = []
        run, cli._run = cli._run, lambda prog, commands, default, doc, words: asked.append(commands) or 0
        try: main_of(name)([])
        finally: cli._run = run
        for sub, function in ({"": asked[0]} if callable(asked[0]) else asked[0]).items():
            options = [p.option for p in cli.parameters(function) if p.kind in (int, float)]
            found += [(f"{name} {sub}".strip(), option, value) for option in options if sub != "intervene" or option not in EDITS for value in ("0", "-1") if value != "0" or option not in ZERO]
    return found


@pytest.mark.parametrize("command, option, value", numbers())
def test_no_number_silently_means_the_default(command, option, value, place, monkeypatch, capsys):
    "Zero and less are refused by name, where they have no meaning of their own"
    monkeypatch.chdir(place)
    monkeypatch.setattr(loop, "train", lambda cfg, **keys: (_ for _ in ()).throw(Planned()))
    name, *sub = command.split()
    try: code = main_of(name)([*sub, *LEAST[command], option, value])
    except Planned: code = 0
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1, f"{command} {option} {value}: {code} {said}"
    assert re.search(rf"{option[2:].replace('-', '[-_]').rstrip('s')}s?\b", said), f"{command} {option} {value}: {said}"
