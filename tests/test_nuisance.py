"Axes that are tuned and not compared: each arm at its own best, the ledger of what was tried, and what cannot be asked."
import json

import numpy as np
import pandas as pd
import pytest

from peer_nb.config import config_from_dict
from peer_nb.files import UserError
from peer_nb.findings.own_best import ledger_warnings, own_best
from peer_nb.findings.results import load_runs
from peer_nb.findings.study_page import study_page
from peer_nb.findings.summary import summary_lines
from peer_nb.findings.verdicts import study_findings
from peer_nb.running.command import make_folder
from peer_nb.running.estimates import plan_text
from peer_nb.study.plan import load_plan, make_plan
from peer_nb.study.run import Result, Run
from peer_nb.study.study import load_study

from test_ablation import BASE, STUDY, write_study

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
