"Runs that were computed anywhere before are found, copied and named; what cannot be read, or is not quite the same, is not."
import json
import os
import shutil
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from fake_studies import ended, fake_study, launch
from test_ablation import call

from peer_nb.running import command as runner
from peer_nb.study.plan import load_plan, make_plan
from peer_nb.running.register import earlier_studies, registered, remember
from peer_nb.running.reuse import taken_over
from peer_nb.files import read_json, write_json


@pytest.fixture
def own_register(tmp_path, monkeypatch) -> Path:
    "A register for this test alone"
    monkeypatch.setenv("PEER_NB_REGISTER", str(tmp_path/"register"))
    monkeypatch.setenv("FAKE_STEP", "0")
    return tmp_path/"register"


def table(folder: Path) -> pd.DataFrame: return pd.read_csv(folder/"ablation_results.csv")


def only(place: Path) -> Path:
    folder, = place.iterdir()
    return folder


def computed_study(work: Path, out: Path) -> Path:
    "A study as it lies there when all its runs are done, without the time that they take"
    request = runner.read_request(None, work/"study.yaml", None, None, None, None, [])
    plan = make_plan(request.study, request.base, where=request.where)
    folder = runner.make_folder(out, plan, "cpu")
    for n, cell in enumerate(plan.cells):
        run = folder/"runs"/cell.id
        run.mkdir()
        write_json(run/"result.json", dict(schema=1, metrics={"words/bits_per_byte": 2.0 + n, "words/loss": 4.0 + n}, parameters=dict(total=1000, active=10),
                                           training=dict(tokens=640, seconds=1.5, tokens_per_second=426.7, peak_memory_bytes=12345), environment=dict(device="cpu", threads=1)))
        for name in ("report.html", "config.yaml", "notebook.ipynb"): (run/name).write_text("as the run left it")
        (run/"items.jsonl").write_text('{"metric": "words/loss", "item": "a", "value": 1.0}\n')
        write_json(run/"status.json", dict(state="DONE", exit_code=0, seconds=5.0))
    remember(folder, plan)
    return folder


def test_a_study_in_another_folder_is_found_and_may_then_be_deleted(own_register, tmp_path, capsys):
    "Three output folders: the second takes all from the first, which is deleted; the third takes all from the second and says who computed it"
    work = fake_study(tmp_path/"work", seeds=[1])
    command = ["--study", work/"study.yaml", "--gpus", 0]
    first = computed_study(work, work/"one")
    run = load_plan(first).cells[0].id

    code, out, err = call(capsys, "plan", *command, "--output-dir", work/"two")
    assert code == 0 and f"reuse: 2 from {first}\n" in out and not (work/"two").exists(), out + err
    code, out, err = call(capsys, *command, "--output-dir", work/"two")
    second = only(work/"two")
    assert code == 0 and "2 of 2 runs were computed before" in out and "--fresh computes them anew" in out and f"reuse: 2 from {first}\n" in out and "0 of 2 runs to do" in out, out + err
    assert "2 of 2 runs done, all of them taken over from earlier studies" in out and "best words/bits_per_byte" in out
    assert not (second/"begun.jsonl").exists()
    shutil.rmtree(work/"one")

    code, out, err = call(capsys, *command, "--output-dir", work/"three")
    third = only(work/"three")
    assert code == 0 and f"reuse: 2 from {second}, 2 of them taken over there" in out, out + err
    rows = table(third)
    assert rows.state.tolist() == ["REUSE"]*2 and rows["words/loss"].tolist() == table(second)["words/loss"].tolist()
    assert [Path(p).parent.parent for p in rows.reuse_origin] == [first]*2 and [Path(p).parent.parent for p in rows.reuse_source] == [second]*2
    for folder in (second, third):
        assert (folder/"runs"/run/"items.jsonl").read_text().startswith('{"metric"')
        page = (folder/"index.html").read_text()
        assert "Taken over from earlier studies" in page and str(first) in page
        assert call(capsys, "report", folder)[0] == 0
    for link in ("report.html", "config.yaml", "notebook.ipynb"): assert (third/"runs"/run/link).is_file()

    code, out, err = call(capsys, "plan", *command, "--output-dir", work/"four", "--fresh")
    assert code == 0 and "computed before" not in out and "2 runs;" in out, out + err


def test_fresh_computes_what_is_there_already(computed, own_register, tmp_path, capsys):
    "A real run in a new folder takes nothing over, and leaves what is taken over afterwards"
    command = ["--study", computed/"study.yaml", "--gpus", 0]
    remember(only(computed/"out"), load_plan(only(computed/"out")))
    assert "reuse: 1" in call(capsys, "plan", *command)[1]
    code, out, err = call(capsys, *command, "--output-dir", tmp_path/"new", "--fresh")
    assert code == 0 and "1 of 1 runs to do" in out and "computed before" not in out and table(only(tmp_path/"new")).state.tolist() == ["DONE"], out + err
    assert f"reuse: 1 from {only(tmp_path/'new')}" in call(capsys, "plan", *command)[1], "the newest comes first"


def test_folders_of_other_people_are_named(own_register, tmp_path, capsys):
    "By the option and by the study file; neither is guessed, and a wrong one is refused before anything is made"
    work = fake_study(tmp_path/"work", seeds=[1])
    computed_study(work, work/"theirs")
    shutil.rmtree(own_register)
    ask = ["plan", "--study", work/"study.yaml", "--gpus", 0, "--output-dir", work/"mine"]
    assert "reuse:" not in call(capsys, *ask)[1]
    for place in (work/"theirs", only(work/"theirs")):
        assert f"reuse: 2 from {only(work/'theirs')}" in call(capsys, *ask, "--reuse-from", place)[1]
    study = yaml.safe_load((work/"study.yaml").read_text())
    (work/"study.yaml").write_text(yaml.safe_dump(study | dict(reuse_from=["theirs"])))
    assert f"reuse: 2 from {only(work/'theirs')}" in call(capsys, *ask)[1] and "reuse:" not in call(capsys, *ask, "--fresh")[1]
    for study_from, words, said in [(["nowhere"], [], f"reuse_from {work}/nowhere: no such folder"), ([], ["--reuse-from", work/"nowhere"], f"--reuse-from {work}/nowhere: no such folder"),
                                    ([], ["--reuse-from", work], "no study here"), ([], ["--fresh", "--reuse-from", work/"theirs"], "--fresh computes everything, --reuse-from takes runs over")]:
        (work/"study.yaml").write_text(yaml.safe_dump(study | dict(reuse_from=study_from)))
        code, out, err = call(capsys, *ask[1:], *words)
        assert code == 2 and said in err and err.count("\n") == 1 and not (work/"mine").exists(), err
    (work/"study.yaml").write_text(yaml.safe_dump(study | dict(reuse_from=["theirs"])))
    code, out, err = call(capsys, *ask[1:])
    assert code == 0 and "0 of 2 runs to do" in out
    assert yaml.safe_load((only(work/"mine")/"study.yaml").read_text())["reuse_from"] == [str(work/"theirs")]
    code, _, err = call(capsys, "--resume", "--output-dir", work/"mine", "--reuse-from", work/"theirs")
    assert code == 2 and "belongs to a new study" in err


BREAK = {"a result that holds no number": lambda run: write_json(run/"result.json", dict(metrics={"words/bits_per_byte": "good"})), "a result that was cut off": lambda run: (run/"result.json").write_text('{"metrics": {'),
         "a status that is no mapping": lambda run: write_json(run/"status.json", [1]), "a run of a GPU": lambda run: write_json(run/"result.json", read_json(run/"result.json") | dict(environment=dict(device="NVIDIA H200"))),
         "another torch": lambda run: write_json(run/"result.json", read_json(run/"result.json") | dict(environment=dict(device="cpu", torch="1.0"))), "a run that failed": lambda run: write_json(run/"status.json", dict(state="FAILED", exit_code=1)),
         "a run taken over with a difference": lambda run: write_json(run/"status.json", dict(state="REUSE", source="x", reason="y", differs=["train_config.seed: 1 there, 2 here"])),
         "a plan that was edited": lambda run: write_json(run.parent.parent/"plan.json", read_json(run.parent.parent/"plan.json") | dict(hash="0"*64)), "a plan that is no JSON": lambda run: (run.parent.parent/"plan.json").write_text("{"),
         "a folder that was emptied": lambda run: shutil.rmtree(run)}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    "A study of one run that is done"
    work = fake_study(tmp_path_factory.mktemp("computed"), seeds=[1], axes={"heads": {"four": {}}})
    computed_study(work, work/"out")
    return work


@pytest.mark.parametrize("what", BREAK)
def test_what_is_not_a_whole_equal_run_is_not_taken(computed, what, own_register, tmp_path):
    "The same file of the register finds it before, and after it was mended"
    folder = tmp_path/"out"/"study"
    shutil.copytree(only(computed/"out"), folder)
    plan = load_plan(folder)
    assert remember(folder, plan)
    assert len(taken_over(plan, earlier_studies(tmp_path/"new"), "cpu")) == 1
    BREAK[what](folder/"runs"/plan.cells[0].id)
    assert taken_over(plan, earlier_studies(tmp_path/"new"), "cpu") == {}


def test_a_register_that_cannot_be_written_costs_a_line(computed, tmp_path, capsys, monkeypatch):
    "And one that is full of rubbish costs nothing"
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("PEER_NB_REGISTER", str(tmp_path/"file"/"register"))
    ask = ["--study", computed/"study.yaml", "--gpus", 0]
    code, out, err = call(capsys, *ask, "--reuse-from", computed/"out", "--output-dir", tmp_path/"one")
    assert code == 0 and err.startswith("warning: later studies will not find this one") and err.count("\n") == 1 and "0 of 1 runs to do" in out, out + err
    monkeypatch.setenv("PEER_NB_REGISTER", str(tmp_path/"rubbish"))
    (tmp_path/"rubbish").mkdir()
    for n, text in enumerate(["", "[]", "{", '{"schema": 1}', '{"schema": 1, "folder": [], "runs": {}}', "\xff", "[" * 5000]): (tmp_path/"rubbish"/f"{n}.json").write_bytes(text.encode("latin-1"))
    code, out, err = call(capsys, "plan", *ask, "--output-dir", tmp_path/"two")
    assert code == 0 and err == "" and "reuse:" not in out, out + err
    assert not any((tmp_path/"rubbish").iterdir())


def test_two_studies_that_start_at_once_are_both_entered(computed, own_register, tmp_path):
    both = [launch("--study", computed/"study.yaml", "--gpus", 0, "--output-dir", tmp_path/name, "--reuse-from", computed/"out") for name in ("a", "b")]
    for process in both:
        code, said = ended(process)
        assert code == 0 and "0 of 1 runs to do" in said and "1 of 1 runs done" in said, said
    assert {s.folder.parent.name for s in registered()} == {"a", "b"}


def test_a_study_that_was_moved_is_found_again_when_it_is_continued(computed, own_register, tmp_path, capsys):
    shutil.copytree(only(computed/"out"), tmp_path/"moved"/"study")
    plan = load_plan(tmp_path/"moved"/"study")
    assert taken_over(plan, earlier_studies(tmp_path/"new"), "cpu") == {}
    assert call(capsys, "--resume", "--output-dir", tmp_path/"moved")[0] == 0
    assert {Path(t.source).parent.parent for t in taken_over(plan, earlier_studies(tmp_path/"new"), "cpu").values()} == {tmp_path/"moved"/"study"}


def test_plans_are_opened_only_where_a_run_may_be(own_register, tmp_path, computed, monkeypatch):
    "Hundreds of studies, one of which has what is wanted: one plan is read"
    folder = only(computed/"out")
    plan = load_plan(folder)
    remember(folder, plan)
    for n in range(300):
        other = tmp_path/"out"/f"study-{n}"
        other.mkdir(parents=True)
        (other/"plan.json").write_text("not read")
        (own_register/f"{n:032x}.json").write_text(json.dumps(dict(schema=1, folder=str(other), runs=f"{n:016x}")))
    opened = []
    monkeypatch.setattr("peer_nb.running.reuse.load_plan", lambda path: opened.append(path) or load_plan(path))
    assert len(taken_over(plan, earlier_studies(tmp_path/"new"), "cpu")) == 1 and opened == [folder]
    assert len(registered()) == 301


def test_an_unmounted_disk_is_not_forgotten_at_once(own_register, tmp_path, computed):
    disk = tmp_path/"disk"/"out"
    shutil.copytree(only(computed/"out"), disk/"study")
    plan = load_plan(disk/"study")
    remember(disk/"study", plan)
    disk.rename(tmp_path/"elsewhere")
    assert registered() == [] and len([*own_register.iterdir()]) == 1
    (tmp_path/"elsewhere").rename(disk)
    assert len(registered()) == 1
    entry, = own_register.iterdir()
    shutil.rmtree(disk/"study")
    assert registered() == [] and not entry.exists()
    remember(disk/"study", plan)
    shutil.rmtree(disk)
    os.utime(entry, (time.time() - 40*86_400,)*2)
    assert registered() == [] and not entry.exists()
