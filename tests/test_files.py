"Kill -9 at every line and at random instants: files stay whole, logs lose one line at most, locks and children end"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import in_child

from peer_nb import files
from peer_nb.files import UserError, append_jsonl, cache_folder, folder_lock, new_folder, output_folder, read_json, read_jsonl, write_atomic, write_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills processes as POSIX does")


def killed_at_line(number: int, call, *args) -> bool:
    "Run a call in a fork that kills itself before the n-th line of peer_nb.files; whether it came that far"
    child = os.fork()
    if child == 0:
        count = 0
        def trace(frame, event, arg):
            nonlocal count
            if frame.f_code.co_filename != files.__file__: return None
            if event == "line":
                count += 1
                if count == number: os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        call(*args)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def start(code: str, *args, **kwargs) -> subprocess.Popen:
    "A Python process that runs a text"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_until(condition, seconds=600.0):
    "Wait for a condition"
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def write_atomic_killed_before_every_line(folder: Path):
    target, old, new = folder/"file.txt", "old" * 1000, "new content" * 1000
    seen, number = set(), 0
    while True:
        number += 1
        write_atomic(target, old)
        killed = killed_at_line(number, write_atomic, target, new)
        assert target.read_text() in (old, new)
        seen.add(target.read_text() == new)
        if not killed: break
    assert number > 10 and seen == {True, False}
    write_atomic(target, new)   # what the killed ones left behind is in nobody's way
    assert target.read_text() == new


def append_killed_before_every_line(folder: Path):
    log, records = folder/"log.jsonl", 0
    for number in range(1, 100):
        killed = killed_at_line(number, append_jsonl, log, dict(number=number))
        survived = [r["number"] for r in read_jsonl(log)]
        assert survived in ([*range(1000, 1000 + records)], [*range(1000, 1000 + records), number])
        if not killed: break
        log.unlink(missing_ok=True)
        records = number % 3
        for i in range(records): append_jsonl(log, dict(number=1000 + i))
    assert 8 < number < 99


@pytest.mark.parametrize("killed", [write_atomic_killed_before_every_line, append_killed_before_every_line])
def test_killed_before_every_line(tmp_path, killed):
    "In a process that has nothing but files to fork: this one has threads"
    in_child(killed, tmp_path)


WRITER = """
import sys
from peer_nb.files import append_jsonl, write_atomic
print("ready", flush=True)
for i in range(10**9):
    if sys.argv[2] == "file": write_atomic(sys.argv[1], str(i % 10) * 200_000)
    else: append_jsonl(sys.argv[1], dict(i=i, text="x"*50_000))
"""


def test_killed_at_random_instants_file_is_whole(tmp_path):
    target = tmp_path/"file.txt"
    for round in range(8):
        writer = start(WRITER, target, "file")
        assert writer.stdout.readline() == "ready\n"
        wait_until(target.exists)
        time.sleep(0.003 * round)
        writer.kill()
        writer.wait()
        text = target.read_text()
        assert len(text) == 200_000 and len(set(text)) == 1


def test_killed_at_random_instants_log_keeps_order(tmp_path):
    log = tmp_path/"log.jsonl"
    for round in range(8):
        writer = start(WRITER, log, "log")
        assert writer.stdout.readline() == "ready\n"
        wait_until(log.exists)
        time.sleep(0.003 * round)
        writer.kill()
        writer.wait()
    starts = [r["i"] for r in read_jsonl(log)]
    assert all(b in (a + 1, 0) for a, b in zip(starts, starts[1:]))
    append_jsonl(log, dict(i=-1))
    assert [json.loads(line)["i"] for line in log.read_text().splitlines()] == [*starts, -1]


def test_two_processes_append_without_loss(tmp_path):
    code = "import sys\nfrom peer_nb.files import append_jsonl\nfor i in range(300): append_jsonl(sys.argv[1], dict(who=sys.argv[2], i=i, pad='x'*3000))"
    both = [start(code, tmp_path/"log.jsonl", who) for who in "ab"]
    assert [p.wait() for p in both] == [0, 0]
    records = read_jsonl(tmp_path/"log.jsonl")
    for who in "ab": assert [r["i"] for r in records if r["who"] == who] == list(range(300))


HOLDER = "import sys, time\nfrom peer_nb.files import folder_lock\nwith folder_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)"


def test_folder_lock_between_processes_and_after_a_kill(tmp_path):
    holder = start(HOLDER, tmp_path)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}; wait until it is done"):
        with folder_lock(tmp_path): pass
    with pytest.raises(UserError, match=f"process {holder.pid}"):
        with folder_lock(tmp_path, wait=0.1): pass
    holder.kill()
    holder.wait()
    with folder_lock(tmp_path):   # the kernel gave the lock up, although the holder's note is still there
        assert read_json(tmp_path/".lock.json")["pid"] == os.getpid()
    assert not (tmp_path/".lock.json").exists()


def test_folder_lock_waits(tmp_path):
    holder = start(HOLDER.replace("60", "0.3"), tmp_path)
    assert holder.stdout.readline() == "held\n"
    with folder_lock(tmp_path, wait=20): pass
    assert holder.wait() == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_folder_lock_is_given_up_on_an_error(tmp_path, error):
    with pytest.raises(error):
        with folder_lock(tmp_path): raise error
    with folder_lock(tmp_path): pass


PARENT = """
import os, subprocess, sys, time
child = "import os, sys, time\\nfrom peer_nb.files import die_with_parent\\nassert die_with_parent(int(sys.argv[1]))\\nopen(sys.argv[2], 'w').write(str(os.getpid()))\\ntime.sleep(60)"
subprocess.Popen([sys.executable, "-c", child, str(os.getpid()), sys.argv[1]])
time.sleep(60)
"""


def gone(pid: int) -> bool:
    "Whether a process has ended (one that nobody waits for stays as a zombie)"
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError: return True


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux system call")
def test_child_dies_with_killed_parent(tmp_path):
    note = tmp_path/"child.pid"
    parent = start(PARENT, note)
    wait_until(lambda: note.exists() and note.read_text())
    child = int(note.read_text())
    assert not gone(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(child))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\x00"])
def test_broken_json_names_the_file(tmp_path, content):
    (tmp_path/"status.json").write_bytes(content)
    with pytest.raises(UserError, match="status.json: not a JSON file"): read_json(tmp_path/"status.json")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_result_files_are_strict_json(tmp_path, bad):
    "No other program reads NaN or Infinity; what was there stays"
    write_json(tmp_path/"a.json", dict(loss=1.5))
    with pytest.raises(UserError, match="a.json: not written, since a number in it is not finite"): write_json(tmp_path/"a.json", dict(best=[bad]))
    with pytest.raises(UserError, match="not finite"): append_jsonl(tmp_path/"a.jsonl", dict(loss=bad))
    assert read_json(tmp_path/"a.json") == dict(loss=1.5) and not (tmp_path/"a.jsonl").exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_folder_that_even_root_cannot_write():
    with pytest.raises(UserError, match="not a folder that can be written to"): files.writable_folder("/proc/peer_nb/out")


def test_a_home_that_cannot_be_written_to_says_what_to_set(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/nohome")
    for name in ("PEER_NB_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="PEER_NB_CACHE"): cache_folder()


def begun(place: Path, error: type, *names: str) -> set[str]:
    "What is left of a command that ends in an error after it has written some files: one in its folder, one beside it, one in a third"
    with pytest.raises(error):
        with output_folder(place/"a"/"b"/"c") as folder:
            assert folder == place/"a"/"b"/"c" and (folder/".lock").exists()
            for name in names:
                (folder/name).parent.mkdir(exist_ok=True, parents=True)
                (folder/name).touch()
            raise error("as it goes")
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if not path.name.startswith(".lock")}


@pytest.mark.parametrize("error, names, left", [
    (UserError, (), set()), (UserError, ("d/e",), {"a", "a/b", "a/b/c", "a/b/c/d", "a/b/c/d/e"}), (UserError, ("../../x/y",), {"a", "a/x", "a/x/y"}),
    (KeyboardInterrupt, (), {"a", "a/b", "a/b/c"}), (ValueError, (), {"a", "a/b", "a/b/c"})])
def test_a_mistake_leaves_a_folder_only_with_something_in_it(tmp_path, error, names, left):
    "Parents that others have come to use stay; so does what was there before"
    assert begun(tmp_path, error, *names) == left
    (tmp_path/"old"/"a"/"b").mkdir(parents=True)
    assert begun(tmp_path/"old", error) == {"a", "a/b", *(() if error is UserError else ("a/b/c",))}


def test_a_folder_that_another_process_took_first_stays(tmp_path, monkeypatch):
    "Between making it and locking it"
    def taken_first(path):
        Path(path).mkdir()
        holders.append(start(HOLDER, path))
        assert holders[0].stdout.readline() == "held\n"
        return Path(path), [Path(path)]
    holders = []
    monkeypatch.setattr(files, "_made_writable", taken_first)
    with pytest.raises(UserError, match="in use by process"), output_folder(tmp_path/"a"): pass
    assert (tmp_path/"a"/".lock.json").exists()
    holders[0].kill()
    holders[0].wait()


def make_folder(final: Path) -> None:
    "Two files, whole or not at all"
    with new_folder(final) as folder:
        (folder/"a").write_text("first")
        (folder/"b").write_text("second")


def test_a_new_folder_is_whole_or_not_there_and_a_kill_leaves_nothing_for_ever(tmp_path):
    final, number, killed = tmp_path/"made", 0, 0
    while not final.exists():
        number += 3
        killed += killed_at_line(number, make_folder, final)
    assert killed > 5 and {path.name: path.read_text() for path in final.iterdir()} == dict(a="first", b="second")
    make_folder(tmp_path/"other")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"made", "other"}
    with pytest.raises(UserError, match="is there already, and is not empty"): make_folder(final)
    with folder_lock(tmp_path, name=".third.lock"), pytest.raises(UserError, match="in use by"): make_folder(tmp_path/"third")


def test_half_a_character_is_written_as_json_spells_it(tmp_path):
    "From somebody's JSON: UTF-8 cannot say it, and the work is not lost for it"
    value = dict(said=json.loads('"x \\ud83d y"'), other="größer")
    assert read_json(write_json(tmp_path/"a.json", value)) == value
    append_jsonl(tmp_path/"a.jsonl", value)
    assert read_jsonl(tmp_path/"a.jsonl") == [value]
