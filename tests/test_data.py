"""Corpora and packing across processes: nothing held out leaks, resumes are exact, caches survive kills."""
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from peer_nb.config import Config, DatasetConfig, DatasetEntry, EvalConfig, TrainConfig, apply_overrides, load_config, load_data_mixes
from peer_nb.files import UserError
from peer_nb.data import corpora
from peer_nb.data.corpora import data_fingerprint, data_manifest, documents, load_tokenizer, summary
from peer_nb.data.packing import Mix, StreamingRows, training_batches, tokenised
from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
from peer_nb.data.command import main as task_main
from peer_nb.training.steps import accumulate_gradient

LIBRARY = [DatasetEntry("docs", "python:docs"), DatasetEntry("stdlib", "python:stdlib")]


def child(code, *args, cache, **env):
    "Run Python code in a process of its own."
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PEER_NB_CACHE": str(cache)} | env)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache of this test's own."
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"


@pytest.fixture
def files(tmp_path):
    "Two sets of small documents."
    def write(name, n, word):
        lines = [json.dumps(dict(text=f"{name} {i}: " + f"{word} "*(i*i % 23), n=i)) for i in range(n)]
        (tmp_path/f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        return DatasetEntry(name, str(tmp_path/f"{name}.jsonl"))
    return [write("ants", 150, "leaf"), write("bees", 90, "pollen")]


def squeezed_windows(texts, size):
    for text in texts:
        text = re.sub(r"\s+", " ", text)
        for i in range(len(text) - size + 1): yield text[i:i + size]


# ---- held out ----

@pytest.mark.slow
def test_no_long_heldout_window_is_trained_on(record_property):
    """By brute force: of the held-out text of both corpora, every window of 200 characters (white space squeezed) is looked
    for in all training text of both. None may be there. Windows of 100 characters, a line or two, may: idioms of code and
    phrases of documentation that many modules share (measured on Python 3.11: 0.2 % of docs, 0.35 % of stdlib)."""
    train = {e.name: list(documents(e)) for e in LIBRARY}
    heldout = {e.name: list(documents(e, heldout=True)) for e in LIBRARY}
    assert all(len(t) > 100 for t in train.values()) and all(len(t) > 5 for t in heldout.values())
    for size, bound in ((200, 0), (100, .01)):
        windows = {name: set(squeezed_windows(texts, size)) for name, texts in heldout.items()}
        both = set().union(*windows.values())
        found = {w for texts in train.values() for w in squeezed_windows(texts, size) if w in both}
        for name, mine in windows.items():
            rate = len(found & mine)/len(mine)
            record_property(f"{name}: held-out windows of {size} characters found in training text", rate)
            assert rate <= bound, f"{name}: {rate:.2%} of {size}-character windows, such as {next(iter(found & mine))!r}"


def test_library_is_split_by_path_for_docs_and_source_alike():
    root = Path(sysconfig.get_path("stdlib"))
    heldout, train = list(documents(LIBRARY[1], heldout=True)), set(documents(LIBRARY[1]))
    assert len(heldout) > 300 and max(map(len, heldout)) < sum(map(len, heldout))/10 and len({*heldout}) == len(heldout)
    docs = "\n".join(documents(LIBRARY[0], heldout=True))
    seen = 0
    for path in ("sched.py", "secrets.py", "json/decoder.py", "heapq.py", "traceback.py"):
        below = int(hashlib.sha256(path.encode()).hexdigest()[:16], 16)/16**16 < .05
        source = (root/path).read_text(encoding="utf-8")
        first = __import__(path[:-3].replace("/", "."), fromlist=["x"]).__doc__.strip().splitlines()[0]
        pieces = [*corpora.definitions(source)]
        assert "".join(pieces) == source and (len(pieces) > 2) and all((p in heldout) == below for p in pieces), path
        assert (source in train, first in docs) == (not below, below), path
        seen += below
    assert 0 < seen < 5


def test_left_out_folders_stay_out():
    keys = [path for path, *_ in corpora.library_files()]
    parts = {part for key in keys for part in key.split("/")[:-1]}
    assert parts.isdisjoint({"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings"}) and "asyncio" in parts
    assert not any("\\" in key or key.startswith("/") for key in keys)


def test_plan_needs_no_heavy_import(cache):
    code = """
import sys
from peer_nb.config import Config, DatasetConfig, DatasetEntry
from peer_nb.data.corpora import data_fingerprint
cfg = Config(dataset_config=DatasetConfig([DatasetEntry("docs", "python:docs"), DatasetEntry("stdlib", "python:stdlib")], "corpus:bpe:2048"))
print(data_fingerprint(cfg), sorted({"torch", "transformers", "datasets", "pandas", "tokenizers"} & set(sys.modules)))"""
    first, second = (child(code, cache=cache) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout and first.stdout.split()[1] == "[]"


# ---- identity ----

def test_fingerprint_sees_content_and_no_place(cache, files, tmp_path, monkeypatch):
    def fingerprint(entries=files, **kw): return data_fingerprint(Config(dataset_config=DatasetConfig(entries, "bytes", **kw)))
    base = fingerprint()
    (tmp_path/"elsewhere").mkdir()
    copy = tmp_path/"elsewhere"/"a.jsonl"
    copy.write_bytes(Path(files[0].path).read_bytes())
    assert fingerprint([replace(files[0], path=str(copy)), files[1]]) == base
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path/"other cache"))
    assert fingerprint() == base
    os.utime(files[0].path)
    assert fingerprint() == base
    assert len({base, fingerprint(heldout_fraction=.1), fingerprint(files[::-1]), fingerprint([replace(files[0], weight=2.), files[1]]),
                fingerprint([replace(files[0], text_template="{text} {n}"), files[1]])}) == 5
    with open(files[1].path, "a") as f: f.write('{"text": "one more", "n": 0}\n')
    assert fingerprint() != base


def test_manifest_counts_what_is_read(cache, files):
    cfg = Config(dataset_config=DatasetConfig([replace(files[0], weight=3.), files[1]], "corpus:bpe:300", heldout_fraction=.2),
                 eval_config=EvalConfig(datasets=[files[1]]))
    manifest = data_manifest(cfg)
    for source in manifest["sources"] + manifest["heldout"]:
        data = (path := Path(source["path"])).read_bytes()
        assert source["origin"] == dict(files={path.name: dict(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())})
    assert [s["share"] for s in manifest["sources"]] == [.75, .25] and [h["name"] for h in manifest["heldout"]] == ["bees"]
    for source, entry in zip(manifest["sources"], files):
        texts = list(documents(entry, heldout_fraction=.2))
        assert (source["documents"], source["bytes"]) == (len(texts), sum(len(t.encode()) for t in texts))
    assert json.loads(json.dumps(manifest)) == manifest


@pytest.mark.parametrize("ending", ["jsonl", "json.gz", "csv", "csv.bz2", "txt.xz", "parquet"])
def test_local_formats_give_the_same_documents(ending, cache, tmp_path):
    import bz2, gzip, lzma
    import pandas as pd
    texts = ["plain", "two\nlines", 'quotes "and", commas', "ünïcödé €", "2024-01-01 is a day", "NA"]
    path, frame = tmp_path/f"x.{ending}", pd.DataFrame(dict(text=texts, n=range(6)))
    data = {"json": lambda: frame.to_json(orient="records", lines=True), "csv": lambda: frame.to_csv(index=False),
            "txt": lambda: "\n\n".join(texts)}.get(ending.split(".")[0].replace("jsonl", "json"), str)().encode()
    pack = dict(gz=gzip.compress, bz2=bz2.compress, xz=lzma.compress).get(ending.split(".")[-1], bytes)
    frame.to_parquet(path) if ending == "parquet" else path.write_bytes(pack(data))
    entry = DatasetEntry("x", str(path))
    assert list(documents(entry, heldout_fraction=0)) == texts
    assert list(documents(replace(entry, path=str(tmp_path/"x.*")), heldout_fraction=0)) == texts


def test_names_mean_themselves_and_files_are_read_once(cache, tmp_path):
    "Brackets in names of files and folders, a link to the folder itself, a README beside other data"
    folder = tmp_path/"run[1]"
    for place in (tmp_path/"run1", folder): place.mkdir()
    for file, text in ((tmp_path/"run1"/"x.jsonl", "wrong"), (folder/"x.jsonl", "x"), (folder/"part1.jsonl", "one"), (folder/"part[1].jsonl", "itself")):
        file.write_text(json.dumps(dict(text=text)) + "\n")
    (folder/"loop").symlink_to(folder)
    (folder/"README.md").write_text("# no data")
    read = lambda path, **keys: list(documents(DatasetEntry("x", str(path), **keys), heldout_fraction=0))
    assert read(folder/"part[1].jsonl") == ["itself"] and read(folder/"x.jsonl") == ["x"]
    assert read(folder/"part*.jsonl") == ["one", "itself"]
    assert read(folder) == read(folder, format="json") == ["one", "itself", "x"]


def test_mixes_by_name(cache, files, tmp_path):
    mixes = dict(insects=dict(name="Insects", datasets=[dict(name=e.name, path=e.path, weight=w) for e, w in zip(files, (.8, .2))]))
    (tmp_path/"datasets.yaml").write_text(json.dumps(dict(data_mixes=mixes)))
    mix = load_data_mixes(tmp_path/"datasets.yaml")["insects"]
    batches = training_batches(*small_run(mix.datasets, 100))
    for _ in range(20): next(batches)
    assert batches.proportions() == pytest.approx(dict(ants=.8, bees=.2), abs=.03)


# ---- hub names ----

@pytest.mark.parametrize("entry, asked", [
    (DatasetEntry("pile", "monology/pile-uncopyrighted", streaming=True), dict(path="monology/pile-uncopyrighted", name=None, split="train")),
    (DatasetEntry("c4", "allenai/c4", subset="en", split="validation", streaming=True), dict(path="allenai/c4", name="en", split="validation"))])
def test_hub_sets_by_configuration_alone(entry, asked, cache, monkeypatch):
    "What `datasets` is asked for, at which commit; and that rows come out of what it gives"
    import datasets
    seen = []
    def load_dataset(**kw):
        seen.append(kw)
        return datasets.Dataset.from_dict(dict(text=[f"page {i} of the web" for i in range(50)], url=["u"]*50)).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpora, "hub_revision", lambda name, kind: "0123abc")
    cfg, tokenizer = small_run([entry])
    assert next(training_batches(cfg, tokenizer))["input_ids"].shape == (3, 32)
    assert seen and all(kw == asked | dict(streaming=True, revision="0123abc") for kw in seen)
    origin = data_manifest(cfg)["sources"][0]["origin"]
    assert origin == dict(revision="0123abc", subset=entry.subset, split=entry.split)

@pytest.mark.parametrize("ask", ["dataset", "tokenizer", "manifest"])
def test_hub_name_offline_is_one_clear_error(ask, cache, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    def offline(*a, **kw): raise OfflineModeIsEnabled("offline")
    monkeypatch.setattr(HfApi, "repo_info", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/"hub"))
    pile = DatasetEntry("pile", "monology/pile-uncopyrighted", streaming=True)
    calls = dict(dataset=lambda: documents(pile), tokenizer=lambda: load_tokenizer(DatasetConfig(tokenizer_name="some/tokenizer")),
                 manifest=lambda: data_fingerprint(Config(dataset_config=DatasetConfig([pile], "bytes"))))
    with pytest.raises(UserError, match="hub, which cannot be reached.*point `path`.*local files"): calls[ask]()
    name = "some/tokenizer" if ask == "tokenizer" else "monology/pile-uncopyrighted"
    kind = "model" if ask == "tokenizer" else "dataset"
    kept = tmp_path/"hub"/f"{kind}s--{name.replace('/', '--')}"/"refs"
    kept.mkdir(parents=True)
    (kept/"main").write_text("0123abc")
    assert corpora.hub_revision(name, kind) == "0123abc"


# ---- exact resume ----

SHUFFLES = dict(epoch="the whole set in an order of its own each epoch", blocks="a stream, block by block", both="one source of each kind")
CONFIGURATIONS = [(shuffle, mixed, packing, workers) for shuffle in SHUFFLES for mixed in (False, True) if mixed or shuffle != "both"
                  for packing in ("rows", "varlen") for workers in (0, 2)]
SETUP = """
import hashlib, json, sys
from peer_nb.config import *; from peer_nb.schema import *
from peer_nb.data.corpora import load_tokenizer
from peer_nb.data.packing import StreamingRows, training_batches
StreamingRows.block = 16

def loader(entries, packing, workers):
    "A fresh loader of small batches"
    data = DatasetConfig([DatasetEntry(**e) for e in entries], "corpus:bpe:300", max_seq_length=32, packing=packing)
    cfg = Config(dataset_config=data, train_config=TrainConfig(per_device_train_batch_size=3))
    return training_batches(cfg, load_tokenizer(data), num_workers=workers)

def take(batches, count):
    "A digest of each of the next batches: every key, every bit"
    plain = lambda v: v if isinstance(v, int) else v.tolist()
    return [hashlib.sha256(json.dumps({k: plain(v) for k, v in next(batches).items()}).encode()).hexdigest() for _ in range(count)]
"""
RESUME = SETUP + """
for job in json.load(sys.stdin):
    for state in job["states"]:
        digests = []
        for _ in range(2):   # stopped once more on the way
            batches = loader(*job["loader"])
            batches.load_state_dict(state)
            digests += take(batches, job["count"])
            state = json.loads(json.dumps(batches.state_dict()))
        print(json.dumps([digests, state]))
"""


def undisturbed(files, shuffle, mixed, packing, workers, steps):
    "Arguments of the loader, and of a run without a stop: the state before each batch, and each batch's digest"
    scope = {}
    exec(SETUP, scope)
    entries = [replace(e, weight=w, streaming=shuffle == "blocks" or (shuffle == "both" and e is files[0])) for e, w in zip(files, (3., 1.))]
    args = [[vars(e) for e in entries[:1 + mixed]], packing, workers]
    batches, states, digests = scope["loader"](*args), [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(batches.state_dict())))
        digests += scope["take"](batches, 1)
    assert len(set(digests)) == steps
    if shuffle == "epoch": assert mixed or steps*96 > 2*batches.tokens_per_epoch     # two epochs' ends are behind us
    else: assert min(s["epoch"] for s in states[-1]["sources"].values() if "epoch" in s) >= 2
    return args, states, digests


def resumed_and_expected(files, configurations, cuts, monkeypatch, count=6, steps=160):
    "What follows cuts, and the state in the end: resumed in one child process, and of the run without a stop"
    monkeypatch.setattr(StreamingRows, "block", 16)
    jobs, expected = [], []
    for configuration in configurations:
        args, states, digests = undisturbed(files, *configuration, steps)
        at = cuts(steps - 2*count)
        jobs.append(dict(loader=args, states=[states[c] for c in at], count=count))
        expected += [[digests[c:c + 2*count], states[c + 2*count]] for c in at]
    done = subprocess.run([sys.executable, "-c", RESUME], input=json.dumps(jobs), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], expected


@pytest.mark.slow
def test_resume_in_a_new_process_is_bit_identical(cache, files, monkeypatch):
    "Every configuration, at its beginning and at two cuts of a seeded draw"
    draw = np.random.default_rng(7)
    resumed, expected = resumed_and_expected(files, CONFIGURATIONS, lambda n: [0, *map(int, draw.integers(1, n, 2))], monkeypatch)
    assert resumed == expected


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: "-".join(map(str, c)))
def test_resume_at_twenty_cuts(configuration, cache, files, monkeypatch):
    "Shuffle × interleave × pack × workers"
    draw = np.random.default_rng(CONFIGURATIONS.index(configuration))
    resumed, expected = resumed_and_expected(files, [configuration], lambda n: list(map(int, draw.choice(n, 20, replace=False))), monkeypatch)
    assert resumed == expected


def small_run(entries, batch=3, **data):
    data = DatasetConfig(entries, **dict(tokenizer_name="bytes", max_seq_length=32) | data)
    return Config(dataset_config=data, train_config=TrainConfig(per_device_train_batch_size=batch)), load_tokenizer(data)


@pytest.mark.parametrize("now, named", [
    (dict(file=1), "sources.ants.text: then .*origin.ants.files.ants.jsonl.sha256: then "), (dict(tokenizer_name="corpus:bpe:300"), "tokenizer: then "),
    (dict(num_workers=0), "num_workers: then 2, now 0"), (dict(packing="varlen"), "packing: then rows, now varlen"), (dict(world_size=2), "world_size: then 1, now 2"),
    (dict(weight=2.), "sources.ants.weight: then 1.0, now 2.0"), (dict(heldout_fraction=.5), "heldout_fraction: then 0.05, now 0.5")])
@pytest.mark.parametrize("streaming", [False, True])
def test_changed_data_is_refused(streaming, now, named, cache, files):
    entries, loader, now = [replace(e, streaming=streaming) for e in files], dict(num_workers=2), dict(now)
    batches = training_batches(*small_run(entries), **loader)
    next(batches)
    state = json.loads(json.dumps(batches.state_dict()))
    if now.pop("file", None):
        with open(files[0].path, "a") as f: f.write('{"text": "a late document", "n": 7}\n')
    if "weight" in now: entries[0] = replace(entries[0], weight=now.pop("weight"))
    loader |= {k: now.pop(k) for k in ("num_workers", "world_size") if k in now}
    with pytest.raises(UserError, match=named): training_batches(*small_run(entries, **now), **loader).load_state_dict(state)


# ---- a name is a name ----

@pytest.mark.parametrize("packing, streaming", [("rows", False), ("varlen", False), ("rows", True)])
def test_what_a_set_is_called_changes_no_batch(packing, streaming, cache, files, monkeypatch):
    "Bit-equal batches under other names, of one text twice too; a source that stands elsewhere in the list keeps its own order"
    monkeypatch.setattr(StreamingRows, "block", 16)
    taken = lambda entries: [next(b) for b in [training_batches(*small_run(entries, packing=packing))] for _ in range(30)]
    entries = [replace(e, streaming=streaming) for e in (*files, replace(files[0], name="ants again"))]
    called = [replace(e, name=f"set {i}") for i, e in enumerate(entries)]
    for one, other in zip(taken(entries), taken(called), strict=True):
        assert one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
    there, tokenizer = streams_of(files, streaming, packing, 0, batches=30)
    turned, _ = streams_of([replace(e, name=e.name.upper()) for e in files[::-1]], streaming, packing, 0, batches=30)
    for one, other in zip(there, turned[::-1]):
        known = min(len(one), len(other))
        assert known > 3000 and np.array_equal(one[:known], other[:known])
    same = [replace(files[0], streaming=streaming), replace(files[0], name="again", streaming=streaming)]
    first, second = streams_of(same, streaming, packing, 0, batches=30)[0]
    assert not np.array_equal(first[:1000], second[:1000])


def test_the_order_is_part_of_what_identifies_a_run(cache, files):
    "And where an earlier version went by another order, its checkpoint isn't continued"
    fingerprint = lambda *entries, **data: data_fingerprint(Config(dataset_config=DatasetConfig(list(entries), "bytes", **data)))
    docs = DatasetEntry("docs", "python:docs")
    manifest = lambda *entries: [s.get("order") for s in data_manifest(Config(dataset_config=DatasetConfig(list(entries), "bytes")))["sources"]]
    assert manifest(docs, replace(docs, name="prose"), files[0]) == [None, "docs, 2", summary(files[0], .05)["train"]["sha256"]]
    again = replace(files[0], name="again")
    assert fingerprint(files[0], again) != fingerprint(again, files[0])
    cfg, tokenizer = small_run([files[0], again])
    state = json.loads(json.dumps(training_batches(cfg, tokenizer).state_dict()))
    for source in state["identity"]["sources"].values(): source.pop("order")   # as an earlier version wrote it
    with pytest.raises(UserError, match="sources.ants.order: then None, now "): training_batches(cfg, tokenizer).load_state_dict(state)


# ---- every document once an epoch ----

def streams_of(files, streaming, packing, workers, batches=90, rows=3, length=128, ranks=2):
    "Two processes read a mix: the tokens of each source, in the order in which it gave them"
    entries = [replace(e, weight=w, streaming=streaming) for e, w in zip(files, (3., 1.))]
    cfg, tokenizer = small_run(entries, rows, max_seq_length=length, packing=packing)
    loaders, streams, row = [training_batches(cfg, tokenizer, rank=r, world_size=ranks, num_workers=workers) for r in range(ranks)], [[] for _ in files], 0
    mix = Mix([3., 1.], cfg.train_config.seed)
    for _ in range(batches):
        for loader in loaders:
            sources, tokens = [mix.source(row + i) for i in range(rows)], next(loader)["input_ids"].numpy().reshape(rows, length)
            for source, piece in zip(sources if packing == "rows" else sorted(sources), tokens): streams[source].append(piece)
            row += rows
    return [np.concatenate(s) for s in streams], tokenizer


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", ["rows", "varlen"])
@pytest.mark.parametrize("streaming", [False, True])
def test_mixed_sources_give_each_document_once_an_epoch(streaming, packing, workers, cache, files, monkeypatch):
    monkeypatch.setattr(StreamingRows, "block", 16)
    streams, tokenizer = streams_of(files, streaming, packing, workers)
    for entry, tokens in zip(files, streams):
        texts = [tokenizer.decode(piece[:-1]) for piece in np.split(tokens, np.flatnonzero(tokens == tokenizer.eos_token_id) + 1)[:-1]]
        expected = Counter(documents(entry))
        n, epochs = expected.total(), len(texts)//expected.total()
        assert epochs >= 1
        for e in range(epochs): assert Counter(texts[e*n:(e + 1)*n]) == expected
        assert Counter(texts[epochs*n:]) <= expected and texts[:n] != texts[n:2*n]


def test_no_document_is_lost_or_repeated_in_an_epoch():
    "Python's documentation, its own BPE: two epochs of rows, split at the ends of text, decoded, counted."
    data = DatasetConfig(LIBRARY[:1], "corpus:bpe:2048", max_seq_length=128)
    tokenizer = load_tokenizer(data)
    batches = training_batches(Config(dataset_config=data, train_config=TrainConfig(per_device_train_batch_size=64)), tokenizer)
    n = batches.tokens_per_epoch
    tokens = np.concatenate([next(batches)["input_ids"].numpy().ravel() for _ in range(2*n//(64*128) + 1)])
    expected = Counter(documents(LIBRARY[0]))
    for epoch in range(2):
        part = tokens[epoch*n:(epoch + 1)*n]
        ends = np.flatnonzero(part == tokenizer.eos_token_id)
        pieces = np.split(part, ends + 1)
        assert len(pieces[-1]) == 0
        assert Counter(tokenizer.decode(p[:-1]) for p in pieces[:-1]) == expected


# ---- generated tasks ----

SMALL_TASKS = dict(synthetic_qa=dict(num_pairs=120, seed=5), digit_lookup=dict(num_pairs=40, num_novel=9, num_known=9), two_hop=dict(num_entities=60, num_novel=5, num_novel_ood=5, num_known=9),
                   hashhop=dict(num_samples=20, num_eval=3, n_chars=300, num_queries=2))


@pytest.mark.parametrize("task", SMALL_TASKS)
def test_a_task_entry_reads_what_the_command_writes(task, cache, tmp_path):
    "The rows of an entry are the lines of the files that peer-data makes with the same arguments; the manifest says how"
    entry = DatasetEntry("facts", task=task, task_arguments=json.dumps(SMALL_TASKS[task]))
    words = [word for key, value in SMALL_TASKS[task].items() for word in (f"--{key}", str(value))]
    assert task_main([task, "--output_dir", str(tmp_path/task), *words]) == 0
    lines = {file.stem: [json.loads(line)["text"] for line in file.read_text().splitlines()] for file in (tmp_path/task).glob("*.jsonl")}
    trained, kept = list(documents(entry)), list(documents(entry, heldout=True))
    assert trained == lines["train"]
    assert kept and Counter(kept) <= Counter(text for name, texts in lines.items() if name != "train" for text in texts)
    assert not set(kept) & set(trained)
    cfg = Config(dataset_config=DatasetConfig([entry], "bytes"))
    source, = data_manifest(cfg)["sources"]
    assert source["documents"] == len(trained) and source["bytes"] == sum(map(len, trained))
    assert source["origin"]["task"] == task and SMALL_TASKS[task].items() <= source["origin"]["arguments"].items()
    other = Config(dataset_config=DatasetConfig([replace(entry, task_arguments=json.dumps(SMALL_TASKS[task] | dict(seed=6)))], "bytes"))
    assert data_fingerprint(cfg) != data_fingerprint(other)


@pytest.mark.parametrize("task", SMALL_TASKS)
def test_memory_configurations_train_answers_only(task, cache, tmp_path):
    "configs/memory: the file loads, its arguments can be meant, and in its batches exactly the answers' characters are targets"
    made = {"dataset_config.datasets.0.task_arguments": SMALL_TASKS[task], "dataset_config.max_seq_length": 512, "model_config.max_position_embeddings": 512}
    cfg = load_config(Path(__file__).parents[1]/"configs"/"memory"/f"{task}.yaml")
    corpora.task_arguments(cfg.dataset_config.datasets[0])
    cfg = apply_overrides(cfg, made)
    tokenizer = load_tokenizer(cfg.dataset_config)
    batch = next(training_batches(cfg, tokenizer))
    ids, labels, cuts = (batch[key].flatten().tolist() for key in ("input_ids", "labels", "cu_seqlens"))
    answers, known = 0, set(documents(cfg.dataset_config.datasets[0]))
    for a, b in zip(cuts, cuts[1:]):
        text = bytes(i for i in ids[a:b] if i < 256).decode()
        if text not in known: continue   # cut at the end of a row
        expected = {i for m in re.finditer(r"= '([^'\n]*)'|:(\d+)", text) for i in range(*m.span(m.lastindex)) if task != "hashhop" or m.start() > text.index("COMPLETION:")}
        assert {i for i, label in enumerate(labels[a:b]) if label != -100} == expected, text
        answers += len(expected)
    assert answers


# ---- masks ----

@pytest.mark.parametrize("packing", ["rows", "varlen"])
@pytest.mark.parametrize("streaming", [False, True])
def test_masked_and_plain_sources_in_one_mix(streaming, packing, cache, files, tmp_path):
    "Rows of 16 cut values in the middle: a byte is a target exactly when it is in a value, wherever the cut falls"
    pairs = [" ".join(f"{a}:{a*a} " for a in range(i, i + 7)).replace("  ", " ") for i in range(40)]
    (tmp_path/"squares.jsonl").write_text("".join(json.dumps(dict(text=p)) + "\n" for p in pairs))
    squares = DatasetEntry("squares", str(tmp_path/"squares.jsonl"), mask="digit_lookup", streaming=streaming)
    cfg, tokenizer = small_run([squares, files[0]], 1, max_seq_length=16, packing=packing, heldout_fraction=0.)
    batches, mix, stream = training_batches(cfg, tokenizer), Mix([1., 1.], cfg.train_config.seed), []
    for row in range(500):
        batch = next(batches)
        ids, labels = batch["input_ids"].flatten().tolist(), batch["labels"].flatten().tolist()
        assert all(b in (a, -100) for a, b in zip(ids, labels))
        first = set(batch["cu_seqlens"].tolist()) if packing == "varlen" else set()
        if mix.source(row): assert all(b == a or i in first for i, (a, b) in enumerate(zip(ids, labels)))
        else: stream += [(a, b != -100, i in first) for i, (a, b) in enumerate(zip(ids, labels))]
    ends = [i for i, (a, *_) in enumerate(stream) if a == tokenizer.eos_token_id]
    text = bytes(0 if a == tokenizer.eos_token_id else a for a, *_ in stream[:ends[-1]]).decode()
    inside = {i for m in re.finditer(r":([0-9]+)", text) for i in range(*m.span(1))}
    assert len(ends) > 40 and len(inside) > 1000
    for i in range(len(text)): assert stream[i][1] == (i in inside and not stream[i][2]), text[max(i - 9, 0):i + 9]


def test_varlen_batch_trains_as_its_documents_one_by_one(cache, files):
    "The loss of documents side by side is the mean over the documents, each alone in a forward pass"
    torch.manual_seed(0)
    cfg, tokenizer = small_run(files, packing="varlen")
    peer = dict(num_experts=16, product_key_dim=[4, 4], num_heads=2, num_experts_per_tok=2, query_dim=8, query_norm="layer")
    mla = dict(q_lora_rank=None, kv_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=4)
    model = PeerMLAForCausalLM(PeerMLAConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=260,
                                             max_position_embeddings=32, peer_start_layer=1, peer_config=peer, mla_config=mla)).eval()
    batch = next(training_batches(cfg, tokenizer))
    loss, count = 0.0, 0
    for a, b in zip(batch["cu_seqlens"].tolist(), batch["cu_seqlens"].tolist()[1:]):
        if b - a < 2: continue
        piece = batch["input_ids"][:, a:b]
        loss, count = loss + model(piece, labels=piece).loss.item()*(b - a - 1), count + b - a - 1
    assert count == int((batch["labels"] != -100).sum())
    assert accumulate_gradient(model, [batch], count, cfg.train_config).item() == pytest.approx(loss/count, abs=2e-6)


# ---- caches: killed and contended ----

def test_killed_while_tokenising_leaves_nothing_that_is_believed(cache, files):
    code = """
import os, signal, sys
from peer_nb.config import *; from peer_nb.schema import *
from peer_nb.data import packing
from peer_nb.data.corpora import load_tokenizer
made, done = packing.token_arrays, []
def killing(entry, tokenizer):
    def encode(texts):
        if len(done) > 9: os.kill(os.getpid(), signal.SIGKILL)
        done.append(1)
        return made(entry, tokenizer)(texts)
    return encode
packing.token_arrays = killing
portions = packing.portions
packing.portions = lambda texts: portions(texts, 200)
packing.tokenised(DatasetEntry("ants", sys.argv[1]), load_tokenizer(DatasetConfig(tokenizer_name="bytes")), .05)
"""
    assert child(code, files[0].path, cache=cache).returncode == -signal.SIGKILL
    assert list(cache.rglob("tokens.bin"))   # a torn file is there
    tokenizer = load_tokenizer(DatasetConfig(tokenizer_name="bytes"))
    corpus = tokenised(files[0], tokenizer, .05)
    assert [tokenizer.decode(corpus.tokens[a:b - 1]) for a, b in zip(corpus.starts, corpus.starts[1:])] == list(documents(files[0]))


@pytest.mark.slow
def test_two_processes_that_want_the_same_caches(cache, files):
    code = """
import hashlib, sys
from peer_nb.config import *; from peer_nb.schema import *
from peer_nb.data.corpora import load_tokenizer
from peer_nb.data.packing import training_batches
data = DatasetConfig([DatasetEntry("ants", sys.argv[1])], "corpus:bpe:300", max_seq_length=32)
batches = training_batches(Config(dataset_config=data), load_tokenizer(data))
print(hashlib.sha256(b"".join(next(batches)["input_ids"].numpy().tobytes() for _ in range(9))).hexdigest())
"""
    start = lambda: subprocess.Popen([sys.executable, "-c", code, files[0].path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [start(), start()]
    out = [p.communicate(timeout=600) for p in both]
    assert [p.returncode for p in both] == [0, 0], out
    assert out[0][0] == out[1][0] and len(out[0][0]) == 65
    assert len(list(cache.rglob("tokenizer.json"))) == len(list(cache.rglob("tokens.bin"))) == 1


# ---- real sets, where a folder with them is given ----

@pytest.mark.skipif("PEER_NB_DATA" not in os.environ, reason="PEER_NB_DATA is not set to a folder with gsm8k, tinyshakespeare and wikitext2")
@pytest.mark.parametrize("packing", ["rows", "varlen"])
def test_real_files_by_configuration_alone(packing, cache):
    root = Path(os.environ["PEER_NB_DATA"])
    entries = [DatasetEntry("gsm8k", str(root/"gsm8k"/"train.jsonl"), text_template="{question}\n{answer}"),
               *(DatasetEntry(name, str(root/name/"*.txt")) for name in ("tinyshakespeare", "wikitext2"))]
    cfg, tokenizer = small_run(entries, 16, tokenizer_name="corpus:bpe:1024", max_seq_length=64, packing=packing)
    assert sum(summary(entries[0], .05)[part]["documents"] for part in ("train", "heldout")) == 7473
    batches = training_batches(cfg, tokenizer)
    for _ in range(50): assert next(batches)["input_ids"].numel() == 16*64
    assert all(share > .2 for share in batches.proportions().values())
