"A run's folder has one owner: its files are named in one module, read once, and a broken one is a row with its reason."
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from peer_nb.findings.results import load_runs
from peer_nb.running import command as runner
from peer_nb.study.run import FILES, Result, Run

from test_ablation import call

ROOT = Path(__file__).parent.parent
EARLIER = ROOT/"tests"/"earlier_study"   # four of the demo's sixteen runs, as the version before this page wrote them
OPENED: Counter | None = None


def _note(event: str, args: tuple):
    if event == "open" and OPENED is not None and isinstance(args[0], str) and "/runs/" in args[0]: OPENED[args[0]] += 1


sys.addaudithook(_note)


@pytest.fixture
def earlier(tmp_path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path/"demo"))


def test_a_study_of_an_earlier_version_has_the_same_table(earlier):
    "Number by number, what the version wrote that made the runs"
    before, now = pd.read_csv(EARLIER/"ablation_results.csv"), pd.read_csv(load_runs(earlier).write_csv())
    pd.testing.assert_frame_equal(now.head(4), before.head(4), check_dtype=False, check_exact=True)
    assert now.state.tolist() == ["DONE"]*4 + ["TODO"]*12


def test_a_report_opens_each_file_of_a_run_once(earlier, capsys):
    global OPENED
    OPENED = Counter()
    try: code, out, err = call(capsys, "report", earlier)
    finally: found, OPENED = OPENED, None
    assert code == 0 and "index.html" in out, err
    files = {name for name in FILES.values() if name.endswith((".json", ".jsonl"))}
    read = {Path(path).relative_to(earlier/"runs"): n for path, n in found.items() if Path(path).name in files}
    assert {path.name for path in read} == {"status.json", "result.json", "metrics.jsonl", "items.jsonl"}
    assert len(read) == 4*4 and set(read.values()) == {1}, read


def test_what_an_earlier_version_left_undone_is_not_mixed_with_this_one(earlier, capsys):
    code, _, err = call(capsys, "--resume", "--output-dir", earlier, "--gpus", 0)
    assert code == 2 and "cannot be continued" in err and "the package's source changed since the study was planned" in err, err


BROKEN = {"status": ["", "{}", "[1]", '{"state": "RUNNING", "pid": "7"}', '{"state": "DONE", "exit_code": 0, "differs": 3}', "\0\0"],
          "result": ["", "[]", '{"metrics": {"docs/loss": NaN}}', '{"metrics": {"docs/loss": true}}', '{"metrics": {}, "usage": 3}'],
          "metrics": ["[]\n", "{\n{}\n", '{"step": "x", "loss": 1.0}\n{"step": 1}\n'], "items": ["3\n", '{"metric": "a", "item": 1, "value": "x"}\n'],
          "heartbeat": ["[1]", '{"step": 1, "total_steps": 2, "tokens": NaN, "tokens_per_second": 1.0}']}


@pytest.mark.parametrize("what, text", [(what, text) for what, texts in BROKEN.items() for text in texts])
def test_a_broken_file_hides_no_other_run(earlier, what, text, capsys):
    "Status and report go through; the run is a row, with the reason where it cannot be believed"
    first = next(iter(load_runs(earlier)))
    first.path(what).write_text(text)
    code, out, err = call(capsys, "status", earlier)
    assert code == 0 and first.id in out and "Traceback" not in out + err
    runs = load_runs(earlier)
    rows = runs.rows
    assert rows.state.tolist()[1:4] == ["DONE"]*3 and len(rows) == 16
    if what in ("status", "result"): assert rows.state[0] == "FAILED" and FILES[what] in rows.error[0], rows.error[0]
    else: assert rows.state[0] == "DONE"


def test_a_broken_run_is_made_anew_on_request(earlier):
    run = Run(next(iter(load_runs(earlier))).folder)
    run.path("status").write_text("")
    assert Run(run.folder).state == "FAILED"
    runner.set_aside(earlier, load_runs(earlier).plan, ["1"])
    assert Run(run.folder).state == "TODO" and len(list((earlier/"earlier").iterdir())) == 1


def test_a_lock_file_that_says_nothing_is_no_traceback(tmp_path):
    from peer_nb.files import UserError, folder_lock
    with folder_lock(tmp_path):
        for text in ("{}", "[1]", '{"host": 3}', ""):
            (tmp_path/".lock.json").write_text(text)
            with pytest.raises(UserError, match="in use by another process"), folder_lock(tmp_path): pass


def test_names_of_files_stand_in_one_module():
    "Nobody else in the lab spells the name of a run's folder or file; the trainer names the files that it writes itself"
    names = {"plan.json", *FILES.values()} - {"pulse"}
    spelled = re.compile("|".join(["""/ ?["']runs["']""", """["']runs/""", *(rf"""["'/]{re.escape(name)}["']""" for name in sorted(names))]))
    for room in ("study", "findings", "running"):
        for path in sorted((ROOT/"peer_nb"/room).glob("*.py")):
            if path.name == "run.py": continue
            found = {m[0] for m in spelled.finditer(path.read_text())}
            assert not found, f"{path.relative_to(ROOT)} spells {found}; study/run owns these names"


def test_a_result_is_strict_json(tmp_path):
    import json
    def no(word): raise ValueError(word)
    path = Result({"docs/loss": 1.0}, heldout={"docs": {"perplexity": float("inf")}}).write(tmp_path)
    assert json.loads(path.read_text(), parse_constant=no)["heldout"]["docs"]["perplexity"] is None
