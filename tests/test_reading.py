"Local files are read as they are written, each once, to their end; what was read without guessing before has the fingerprint that it had."
import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peer_nb.config import DatasetEntry
from peer_nb.data import reading
from peer_nb.data.corpora import documents, summary, texts_of
from peer_nb.files import UserError

TEXTS = ["plain", "two\nlines", 'quotes "and", commas', "ünïcödé €", "2024-01-01 is a day", "NA", "", "tab\tand \\ backslash", "e"*3000, "007", "a\r\nb"]
SAMPLES = {   # what a path names -> keys of its entry
    "rows.jsonl": {}, "rows.jsonl.gz": {}, "rows.json": {}, "lines.json": {}, "rows.csv": {}, "rows.csv.bz2": dict(text_template="{text}|{n}"), "prose.txt": {}, "prose.md.xz": {},
    "rows.parquet": dict(text_template="{text}|{n}|{x}"), "parts": dict(text_template="{text} {n}"), "parts/*.jsonl": {}}


def as_csv(rows: list[dict]) -> str:
    "A table with a header"
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([rows[0], *(r.values() for r in rows)])
    return file.getvalue()


def write_samples(folder):
    "The files of SAMPLES, the same each time"
    rng = random.Random(0)
    rows = [dict(text=rng.choice(TEXTS) + str(i)*(i % 3), n=i, x=i/4) for i in range(1500)]
    lines = "".join(json.dumps(r, ensure_ascii=i % 2 == 0) + "\n" for i, r in enumerate(rows)).encode()
    prose = "\n\n".join(r["text"] for r in rows).encode()
    table = as_csv([{k: r[k] for k in ("text", "n")} for r in rows]).encode()
    (folder/"parts"/"more").mkdir(parents=True, exist_ok=True)
    files = {"rows.jsonl": lines, "rows.jsonl.gz": gzip.compress(lines), "rows.json": json.dumps(rows).encode(), "lines.json": json.dumps(rows[:20], indent=2).encode(),
             "rows.csv": table, "rows.csv.bz2": bz2.compress(table), "prose.txt": prose, "prose.md.xz": lzma.compress(prose),
             "parts/b.jsonl": lines[:lines.index(b"\n", 20000) + 1], "parts/a.jsonl": lines[lines.index(b"\n", 20000) + 1:], "parts/more/c.jsonl": lines}
    for name, data in files.items(): (folder/name).write_bytes(data)
    pq.write_table(pa.Table.from_pylist(rows), folder/"rows.parquet")


@pytest.fixture
def read(tmp_path, monkeypatch):
    "What is read of a file with some content, of which nothing is held out"
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path/"cache"))
    def read(name, content=None, **keys):
        path = tmp_path/name
        if content is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(documents(DatasetEntry("x", str(path), **keys), heldout_fraction=0))
    return read


# ---- fingerprints of the reader before this one, which was the `datasets` library ----

BEFORE = {
    "rows.jsonl": "2b03b9e46e3c8d52",
    "rows.jsonl.gz": "2b03b9e46e3c8d52",
    "rows.json": "2b03b9e46e3c8d52",
    "lines.json": "9f6d91f3f527d9f1",
    "rows.csv": "2b03b9e46e3c8d52",
    "rows.csv.bz2": "ba783a2e877d3a7a",
    "prose.txt": "35f1ad182fa7351e",
    "prose.md.xz": "35f1ad182fa7351e",
    "rows.parquet": "67225caa9d7e08da",
    "parts": "de55f34ec30cb9ff",
    "parts/*.jsonl": "5b4d65a92679df1e",
}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_was_read_without_guessing_keeps_its_fingerprint(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PEER_NB_CACHE", str(tmp_path/"cache"))
    write_samples(tmp_path)
    assert summary(DatasetEntry("x", str(tmp_path/name), **SAMPLES[name]), .2)["train"]["sha256"].startswith(BEFORE[name])


def test_a_stream_is_taken_up_at_its_record(tmp_path):
    write_samples(tmp_path)
    for name, keys in SAMPLES.items():
        entry = DatasetEntry("x", str(tmp_path/name), **keys)
        whole = list(texts_of(entry))
        for skip in (0, 1, 1000, len(whole)): assert list(texts_of(entry, skip)) == whole[skip:]


# ---- as they are written ----

def test_no_value_depends_on_other_rows(read):
    q = dict(text_template="{q}={a}")
    lines = '{"q": "x", "a": 2}\n{"q": "y", "a": 1.50}\n{"q": "z", "a": "007"}\n{"q": "big", "a": 123456789012345678901234567890}\n{"q": "day", "a": "2020-01-01"}\n{"q": "so", "a": true}\n'
    wanted = ["x=2", "y=1.50", "z=007", "big=123456789012345678901234567890", "day=2020-01-01", "so=true"]
    assert read("a.jsonl", lines, **q) == wanted
    for n, line in enumerate(lines.splitlines()): read(f"b/{n}.jsonl", line, **q)
    assert read("b", **q) == wanted                                                    # each in a file of its own
    assert read("a.csv", "q,a\nx,2\ny,1.50\nz,007\nw,NA\nv,\n", **q) == ["x=2", "y=1.50", "z=007", "w=NA", "v="]
    assert read("a.tsv", "q\ta\nx\t2,0\n", **q) == ["x=2,0"]


@pytest.mark.parametrize("other", [dict(url=None), dict(id=1), dict(id="x1"), dict(tags=[]), dict(meta=dict(a=1)), dict(meta=[dict(b="x")]), {}], ids=str)
def test_fields_that_are_not_asked_for_do_not_matter(other, read):
    rows = [dict(text=f"d{i}", id=0, meta="m") for i in range(1200)] + [dict(text="last") | other]
    assert read("a.jsonl", "".join(json.dumps(r) + "\n" for r in rows))[-1] == "last"
    read("b/0.jsonl", json.dumps(rows[0])), read("b/1.jsonl", json.dumps(rows[-1]))
    assert read("b") == ["d0", "last"]


def test_columns_of_parquet_that_are_not_asked_for_do_not_matter(read, tmp_path):
    (tmp_path/"p").mkdir()
    tables = dict(text=["a"]), dict(lang=["en"], text=["b"]), dict(text=["c"], lang=[5]), dict(text=pa.array([], pa.string()))
    for n, table in enumerate(tables): pq.write_table(pa.table(table), tmp_path/"p"/f"{n}.parquet")
    (tmp_path/"p"/"README.md").write_text("# About")
    assert read("p") == ["a", "b", "c"]


def test_a_byte_order_mark_is_no_text(read):
    mark = "\ufeff"
    for name, content in {"a.txt": "a\n\nb", "a.jsonl": '{"text": "a"}\n{"text": "b"}', "a.json": '["a", "b"]', "a.csv": "text\na\nb\n", "a.txt.gz": gzip.compress((mark + "a\n\nb").encode())}.items():
        assert read(name, content if isinstance(content, bytes) else mark + content) == ["a", "b"]
    read("b/0.txt", mark + "a"), read("b/1.txt", mark + "b")
    assert read("b") == ["a", "b"]
    assert read("inside.txt", "a" + mark) == ["a" + mark]


def test_letters_that_look_like_ends_of_lines_part_no_records(read, tmp_path):
    "U+2028 and the like are text in JSON, which ends lines by a line feed alone"
    from peer_nb.analysis.ablation import jsonl_questions
    from peer_nb.evaluation.recall import file_rows
    odd = "a\u2028b\u0085c\x1cd"
    line = json.dumps(dict(text=odd, prompt=odd, answer="\u2029"), ensure_ascii=False).replace("\x1c", "\\u001c") + "\n"
    assert read("a.jsonl", line*2) == [odd]*2
    assert [q.prompt for q in jsonl_questions(tmp_path/"a.jsonl")] == [r["text"] for r in file_rows(tmp_path/"a.jsonl")] == [odd]*2


# ---- refused, with the place ----

@pytest.mark.parametrize("name, content, said", [
    ("a.jsonl", '{"text": "a"}\n\n{"text": 5}\n', "line 3: text_field 'text' holds 5, not text. Name another field"),
    ("a.jsonl", '{"text": "a"}\n{"text": 1.50}\n', "line 2: text_field 'text' holds 1.50, not text"),
    ("a.jsonl", '{"text": {"a": 1}}', "line 1: text_field 'text' holds an object, not text"),
    ("a.jsonl", '{"text": "a", "text": "b"}', "line 1: .* is no object of named values"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2: not JSON"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b"}{"text": "c"}', "line 2: not JSON: it goes on after column 13"),
    ("a.jsonl", '{"text": "a\\ud800"}', "line 1: surrogates not allowed"),
    ("a.jsonl", '{"txt": "a"}\n', "line 1: text_field asks for the field 'text'; the fields there are: txt"),
    ("a.json", '[{"text": "a"},\n {"text": "b"}', "line 2: not JSON"),
    ("a.json", "["*100_000, "cannot be read to its end: RecursionError"),
    ("a.csv", "text,n\na,1\nb,2,\n", "line 3: 3 cells, where the header has 2"),
    ("a.csv", 'n,text\n"1\n2",a\n2\n', "line 4: 1 cell, where the header has 2"),
    ("a.csv", 'text,n\n"a,1\nb,2\n', "line 2: not CSV: unexpected end of data"),
    ("a.csv", "text,n,text\na,1,b\n", "line 1: the header has 'text' 2 times"),
    ("a.csv", "text,n\n", ": no rows"),
    ("a.txt", b"fine\n\nna\xefve", "line 3: not UTF-8"),
    ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: not UTF-8"),
    ("a.txt", "\n\n", ": no rows"),
    ("a.txt.gz", b"plain", r"packed with gzip\): cannot be read to its end"),
    ("a.parquet", b"PAR1", "not a whole Parquet file")])
def test_refusals_name_file_and_line(name, content, said, read):
    with pytest.raises(UserError, match=f"dataset 'x': .*/{name}.*{said}") as error: read(name, content)
    assert "\n" not in str(error.value)


def zstd(data: bytes) -> bytes: return pa.Codec("zstd").compress(data).to_pybytes()


@pytest.mark.parametrize("ending, pack", [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)])
def test_a_packed_file_is_whole_or_refused(ending, pack, read):
    lines = [json.dumps(dict(text=random.Random(i).randbytes(20).hex())) + "\n" for i in range(3000)]
    whole = pack("".join(lines).encode())
    assert len(read(f"a.jsonl.{ending}", whole)) == 3000
    assert len(read(f"a.jsonl.{ending}", whole*2)) == 6000          # parts that follow each other
    assert len(read(f"a.jsonl.{ending}", pack("\n\n".join(lines).encode()) + pack(b""))) == 3000
    for size in {1, 5, 100, len(whole)//2, len(whole)-9, len(whole)-1}:
        with pytest.raises(UserError, match=rf"a.jsonl.{ending} \(packed with .*cannot be read to its end"): read(f"a.jsonl.{ending}", whole[:size])


def test_zstd_as_its_own_library_writes_it(read):
    zstandard = pytest.importorskip("zstandard")
    text = "\n\n".join(f"par {i} " + "word "*30 for i in range(5000)).encode()
    packers = zstandard.ZstdCompressor(), zstandard.ZstdCompressor(write_checksum=True, write_content_size=False), zstandard.ZstdCompressor(19)
    for packed in [p.compress(text) for p in packers] + [b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip" + packers[0].compress(text)]:
        assert len(read("a.txt.zst", packed)) == 5000
        with pytest.raises(UserError, match="zstandard"): read("a.txt.zst", packed[:-100])


# ---- each file once, and nothing that is no data ----

def test_each_file_is_read_once_however_it_is_reached(read, tmp_path):
    for name in ("a", "b"): read(f"d/{name}.jsonl", json.dumps(dict(text=name)))
    (tmp_path/"d"/"deep").mkdir()
    for name in ("loop", "another loop", "deep/up"): (tmp_path/"d"/name).symlink_to(tmp_path/"d")
    (tmp_path/"d"/"c.jsonl").symlink_to("a.jsonl")
    os.link(tmp_path/"d"/"b.jsonl", tmp_path/"d"/"deep"/"b.jsonl")
    (tmp_path/"d"/"gone.jsonl").symlink_to("nowhere")
    for path in ("d", "d/*.jsonl", "d/loop/loop", "d/*/*.jsonl"): assert read(path) == ["a", "b"], path
    assert read("d/c.jsonl") == ["a"]


def test_hidden_files_and_parts_without_rows_are_no_data(read):
    for name, content in {"d/.a.jsonl": "not JSON", "d/.git/x.jsonl": "not JSON", "d/._b.jsonl": b"\x00\x05", "d/b.jsonl": '{"text": "b"}', "d/empty.jsonl": "", "d/blank.jsonl": "\n \n"}.items():
        try: read(name, content)
        except UserError: pass
    assert read("d") == read("d/*.jsonl") == ["b"]


# ---- a part of a file in memory at a time ----

@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.txt", "x.jsonl.gz", "x.jsonl.zst"])
def test_memory_does_not_grow_with_the_file(name, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PART", 2**14)
    rows = [dict(text=f"{i} " + "word "*100) for i in range(8000)]                   # 4 MB
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    data = {"x.jsonl": lines, "x.json": json.dumps(rows).encode(), "x.csv": as_csv(rows).encode(), "x.txt": "\n\n".join(r["text"] for r in rows).encode(),
            "x.jsonl.gz": gzip.compress(lines, 1), "x.jsonl.zst": zstd(lines)}[name]
    (tmp_path/name).write_bytes(data)
    tracemalloc.start()
    try:
        number = sum(1 for _ in reading.READERS[reading.format_of(name)](str(tmp_path/name), ["text"]))
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert number == 8000 and peak < 2**20
