"Axes that are tuned and not compared: each arm at its own best, the ledger of what was tried, and what cannot be asked."
import json
from functools import partial

import numpy as np
import pandas as pd
import pytest

from peer_nb.config import config_from_dict
from peer_nb.files import UserError, read_json
from peer_nb.findings.own_best import ledger_warnings, own_best
from peer_nb.findings.results import load_runs
from peer_nb.findings.study_page import study_page
from peer_nb.findings.summary import summary_lines
from peer_nb.findings.verdicts import study_findings
from peer_nb.running import command as runner
from peer_nb.running.command import make_folder
from peer_nb.running.estimates import plan_text
from peer_nb.running.local import Event
from peer_nb.study.plan import load_plan, make_plan
from peer_nb.study.run import Result, Run
from peer_nb.study.study import load_study

import test_rounds
from test_ablation import BASE, STUDY, call, write_study

AXES = {"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}},
        "rate": {name: {"train_config.learning_rate": float(name)} for name in ("0.001", "0.003", "0.01")}}
# at a common rate four heads are worse at two of three; each at its own best, they are better
TRUTH = {("four", "0.001"): 2.0, ("four", "0.003"): 2.3, ("four", "0.01"): 2.6, ("two", "0.001"): 2.4, ("two", "0.003"): 2.1, ("two", "0.01"): 2.2}
CLAIM = dict(name="four heads are better", a={"heads": "four"}, b={"heads": "two"})


def study_of(folder, **changes):
    work = write_study(folder, {**STUDY, "axes": AXES, "nuisance": ["rate"], "seeds": [1, 2, 3], "claims": [CLAIM], **changes})
    return make_plan(load_study(work/"study.yaml"), config_from_dict(json.loads(json.dumps(BASE))), fingerprint=lambda c: "text")


def made(folder, broken=(), left=0):
    plan, rng = study_of(folder), np.random.default_rng(0)
    place = make_folder(folder/"out", plan, "cpu")
    for cell in plan.cells[:len(plan.cells) - left]:
        run, key = Run.of(place, cell.id).make(), tuple(cell.levels.values())
        if key in broken: run.write_status(state="FAILED", exit_code=1, error={"class": "ValueError", "kind": "code", "message": "diverged"}); continue
        Result({"words/bits_per_byte": TRUTH[key] + rng.normal(0, .01)}).write(run.folder)
        run.write_status(state="DONE", exit_code=0)
    return load_runs(place)


def test_each_arm_is_compared_at_its_own_best(tmp_path):
    runs = made(tmp_path)
    best, finding = own_best(runs.rows, runs.plan), study_findings(runs)[0]
    table = runs.rows.groupby(["heads", "rate"])["words/bits_per_byte"].mean().unstack()
    assert {t.arm["heads"]: t.best["rate"] for t in best.ledger} == table.idxmin(axis=1).to_dict()
    assert finding.status == "SUPPORTED" and np.isclose(finding.found.mean, table.min(axis=1)["two"] - table.min(axis=1)["four"])
    for t in best.ledger:
        ordered = table.loc[t.arm["heads"]].sort_values()
        assert np.isclose(t.value, ordered.iloc[0]) and np.isclose(t.next_best, ordered.iloc[1] - ordered.iloc[0]) and t.settings == 3
    warnings = ledger_warnings(best)
    assert [t.edges for t in best.ledger] == [["rate"], []] and "four: the best rate, 0.001, is at the edge" in warnings[0] and "also what is reported" in warnings[-1] and len(warnings) == 2
    page = study_page(runs)
    assert all(line in page for line in warnings) and "What was tried for each arm" in page and finding.said in page
    assert set(warnings) <= set(summary_lines(runs.rows, runs.plan, runs))


def test_fewer_tries_are_flagged_and_arms_with_runs_to_come_wait(tmp_path):
    runs = made(tmp_path/"broken", broken=[("two", "0.01")])
    assert any("two was tried at 2 settings, others at 3" in line for line in ledger_warnings(own_best(runs.rows, runs.plan)))
    waiting = made(tmp_path/"waiting", left=1)
    assert [t.waiting for t in own_best(waiting.rows, waiting.plan).ledger] == [False, True]
    assert study_findings(waiting)[0].status in ("TODO", "PARTIAL")
    study_page(waiting)


def test_chosen_on_one_text_and_reported_on_another(tmp_path):
    plan, rng = study_of(tmp_path), np.random.default_rng(1)
    plan.metric = "words/bits_per_byte_reported"
    rows = pd.DataFrame([dict(c.levels, run=c.id, seed=c.seed, state="DONE", **{plan.metric: rng.normal(), "words/bits_per_byte_chosen": TRUTH[tuple(c.levels.values())]}) for c in plan.cells])
    best = own_best(rows, plan)
    assert best.chosen_on == "words/bits_per_byte_chosen" and [t.best["rate"] for t in best.ledger] == ["0.001", "0.003"]
    assert not any("also what is reported" in line for line in ledger_warnings(best))


def test_the_plan_counts_arms_and_says_what_is_tuned(tmp_path):
    plan = study_of(tmp_path)
    text = plan_text(plan)
    assert len(plan.cells) == 18 and len(plan.arms().cells) == 6 and "rate (3 settings) is tuned" in text and "  heads: " in text and "  rate: " not in text
    make_folder(tmp_path/"out", plan, "cpu")
    again = load_study(next((tmp_path/"out").iterdir())/"study.yaml")
    assert again.nuisance == ["rate"] and load_plan(next((tmp_path/"out").iterdir())).hash == plan.hash


@pytest.mark.parametrize("change, said", [(dict(claims=[dict(name="c", a={"rate": "0.001"}, b={"rate": "0.003"})]), "claims.0.a: 'rate' is a nuisance axis"), (dict(nuisance=["heads", "rate"]), "leaves no axis"),
    (dict(nuisance=["lr"]), "'lr' is no axis; axes: heads, rate"), (dict(design="one_factor"), "nuisance axes need design: full"), (dict(seeds=dict(first=2, most=4)), "tune first")])
def test_what_cannot_be_tuned_is_refused(change, said, tmp_path):
    with pytest.raises(UserError, match="study.yaml, line") as e: study_of(tmp_path, **change)
    assert said in str(e.value) and "\n" not in str(e.value)


# settings that are halved: three rates, so three at a quarter of the tokens, two at half, one in full
HALVED = dict(nuisance_search="halving", budget=dict(tokens=256))


class Instant(test_rounds.Instant):
    "Runs that are done at once; short runs are worse, and so is a rate that does not suit"
    def look(self):
        if self.left == 0: raise KeyboardInterrupt
        cell, self.left = self.queue.pop(0), self.left - 1
        run, key = Run.of(self.folder, cell.id).make(), tuple(cell.levels.values())
        if key in self.broken: run.write_status(state="FAILED", exit_code=1, error={"class": "ValueError", "kind": "code", "message": "diverged"})
        else:
            luck = np.random.default_rng([cell.seed, *map(ord, "".join(key))]).normal(0, .01)
            Result({"words/bits_per_byte": TRUTH[key] + 1 - cell.share + luck}).write(run.folder)
            run.write_status(state="DONE", exit_code=0)
        self.made.append(cell.id)
        return [Event("ended", cell.id)]


@pytest.fixture
def halved(tmp_path, monkeypatch, capsys):
    "A function that starts or continues such a study: exit code, what was said, folder, the launcher"
    def go(*words, name="a", **how):
        made, work = [], tmp_path/name
        monkeypatch.setattr(runner, "launcher_for", lambda folder, *_: made.append(Instant(folder, **how)) or made[-1])
        monkeypatch.setattr(runner, "run_cells", partial(test_rounds.RUN_CELLS, pause=0.0))
        monkeypatch.setattr("peer_nb.findings.study_page.write_report", lambda runs: runs.folder/"index.html")
        if not words: write_study(work, {**STUDY, "axes": AXES, "nuisance": ["rate"], "seeds": [1, 2, 3], "claims": [CLAIM], **HALVED})
        asked = words or ["--study", work/"study.yaml", "--gpus", 0, "--fresh"]
        code, out, err = call(capsys, *asked, "--output-dir", work/"out")
        return code, out + err, next((work/"out").glob("tiny-*")), made[0]
    return go


def test_settings_are_halved_until_one_is_left(halved):
    "Against what the truth says: who is dropped when, how many tokens that takes, and that only full runs with seeds that chose nothing are compared"
    code, out, folder, made = halved()
    runs, plan = load_runs(folder), load_plan(folder)
    assert code == 0 and len(made.made) == len({*made.made}) == 2*(3 + 2 + 3) == len(plan.likely().cells) and len(plan.full().cells) == 18
    assert sorted(c.tokens for c in runs.plan.cells) == [64]*6 + [128]*4 + [256]*6 and sum(c.tokens for c in runs.plan.cells) == sum(c.tokens for c in plan.likely().cells)
    assert all(plan.config(c).train_config.max_tokens == c.tokens for c in plan.cells)
    first, second = read_json(folder/"rounds.json")["rounds"]
    assert [*first["halved"]["four"]["dropped"]] == ["0.01"] and first["halved"]["four"]["kept"] == ["0.001", "0.003"] and first["halved"]["two"]["kept"] == ["0.003", "0.01"]
    assert second["halved"]["four"] | dict(dropped=0) == dict(share=.5, kept=["0.001"], dropped=0) and "dropped at 1/4 of the tokens: 0.01 (3.3" in out
    best, finding = own_best(runs.rows, runs.plan), study_findings(runs)[0]
    assert {*best.rows.seed} == {1, 2, 3} and {*runs.rows[runs.rows.token_share < 1].seed} == {4} and len(best.rows) == finding.pairs*2 == 6
    assert [t.best["rate"] for t in best.ledger] == ["0.001", "0.003"] and finding.status == "SUPPORTED" and abs(finding.found.mean - .1) < .02
    assert [t.settings for t in best.ledger] == [3, 3] and "at 1/4: 0.001 (2.7" in best.ledger[0].tried and best.ledger[0].tried.endswith(f"in full: 0.001 ({best.ledger[0].value:.4f})")
    assert best.ledger[0].next_best == pytest.approx(second["halved"]["four"]["dropped"]["0.003"] - scored(folder, runs, ("four", "0.001"), .5))
    warnings, page = ledger_warnings(best), study_page(runs)
    assert len(warnings) == 1 and "at the edge" in warnings[0] and finding.said in page and "Settings of rate are halved: so far 6 runs at 1/4 of the tokens, 4 at 1/2, 6 in full" in page and best.ledger[0].tried in page
    again = load_study(folder/"study.yaml")
    assert again.nuisance_search == "halving" and again.seeds == [1, 2, 3] and plan.hash == runs.plan.hash


def scored(folder, runs, levels, share):
    cell = next(c for c in runs.plan.cells if tuple(c.levels.values()) == levels and c.share == share)
    return Run.of(folder, cell.id).result.metrics["words/bits_per_byte"]


def test_halving_goes_on_from_wherever_it_was_stopped(halved):
    whole = halved(name="whole")
    for left in (4, 10):   # in the first round, before the full runs
        code, out, folder, first = halved(name=f"cut{left}", left=left)
        study_page(load_runs(folder))
        assert code == 130 and study_findings(load_runs(folder))[0].status in ("TODO", "PARTIAL") and all(t.waiting for t in own_best(load_runs(folder).rows, load_plan(folder)).ledger)
        code, out, _, second = halved("--resume", name=f"cut{left}")
        assert code == 0 and sorted(first.made + second.made) == sorted(whole[3].made), out
        assert study_findings(load_runs(folder))[0].said == study_findings(load_runs(whole[2]))[0].said


def test_a_setting_that_fails_is_dropped_and_an_arm_without_any_says_so(halved):
    code, _, folder, made = halved(broken=[("two", "0.003")])
    runs = load_runs(folder)
    best = own_best(runs.rows, runs.plan)
    assert code == 1 and best.ledger[1].best == {"rate": "0.01"} and "0.003 (–)" in best.ledger[1].tried and any("two was tried at 2 settings, others at 3" in line for line in ledger_warnings(best))
    code, _, folder, made = halved(name="b", broken=[("two", rate) for rate in AXES["rate"]])
    runs = load_runs(folder)
    assert code == 1 and any("two: no setting that was tried has a words/bits_per_byte" in line for line in ledger_warnings(own_best(runs.rows, runs.plan)))
    assert study_findings(runs)[0].status in ("TODO", "INCONCLUSIVE") and study_page(runs)


def test_a_plan_tells_what_halving_saves(tmp_path):
    text = plan_text(study_of(tmp_path, **HALVED))
    assert "settings are halved: 6 runs at 1/4 of the tokens, 4 at 1/2, 6 in full" in text and "16 runs and 2.43k tokens are to be expected" in text and "the whole grid has 18 runs and 4.61k tokens" in text
    assert "3 seeds, power 80 %" in text


@pytest.mark.parametrize("change, said", [(dict(nuisance=[], nuisance_search="halving"), "nuisance_search: halving needs axes that are tuned"), (dict(nuisance_search="thirds"), "nuisance_search"),
    (dict(nuisance_search="halving", budget=dict(matched="wall_time", seconds=5)), "budget.matched: wall_time leaves open")])
def test_what_cannot_be_halved_is_refused(change, said, tmp_path):
    with pytest.raises(UserError, match="study.yaml, line") as e: study_of(tmp_path, **change)
    assert said in str(e.value) and "\n" not in str(e.value)
