"What is recommended after an ablation: settings at their own best rate, differences that are sure, and the notebook that says so."
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from peer_nb.findings.own_best import edge_of
from peer_nb.findings.settings import recommendation, settings_of
from peer_nb.running.command import main as peer_ablate

AXES = dict(rank=["4", "16"], learning_rate=["low", "high"])


def table_of(values: dict) -> pd.DataFrame:
    "(rank, rate) -> (chosen, reported) of three seeds"
    return pd.DataFrame([{"run": f"{rank}-{rate}-{seed}", "rank": rank, "learning_rate": rate, "seed": seed, "state": "DONE", "seconds": 10.0, "new/loss_chosen": chosen[seed],
                          "new/loss_reported": reported[seed], "trained/parameters": 100.0*int(rank)} for (rank, rate), (chosen, reported) in values.items() for seed in range(3)])


def test_a_rate_is_chosen_on_one_half_and_reported_on_the_other():
    rows = table_of({("4", "low"): ([1, 1, 1], [5, 5.1, 5.2]), ("4", "high"): ([2, 2, 2], [3, 3, 3]),
                     ("16", "low"): ([2, 2, 2], [1, 1, 1]), ("16", "high"): ([1, 1, 1], [4, 4, 4.3])})
    found = settings_of(rows, AXES, "new/loss_reported")
    assert [(s.name, s.rate, s.mean) for s in found] == [("16", "high", pytest.approx(4.1)), ("4", "low", pytest.approx(5.1))]
    assert [s.name for s in settings_of(rows, AXES, "new/loss_reported", sign=-1)] == ["4", "16"]


def test_differences_are_scipys_paired_test_with_holms_correction():
    rng = np.random.default_rng(0)
    best, near, far = rng.normal(1, .01, 3), rng.normal(1.01, .05, 3), rng.normal(2, .01, 3)
    rows = pd.DataFrame([dict(run=f"{name}{seed}", rank=name, seed=seed, state="DONE", **{"new/loss": values[seed], "trained/parameters": cost})
                         for name, values, cost in (("a", best, 9.0), ("b", near, 3.0), ("c", far, 1.0)) for seed in range(3)])
    found = {s.name: s for s in settings_of(rows, dict(rank=["a", "b", "c"]), "new/loss")}
    ordered = min(found.values(), key=lambda s: s.mean)
    others = [s for s in found.values() if s is not ordered]
    values = dict(a=best, b=near, c=far)
    raw = sorted((stats.ttest_rel(values[s.name], values[ordered.name]).pvalue, s.name) for s in others)
    assert found[raw[0][1]].p == pytest.approx(2*raw[0][0]) and found[raw[1][1]].p == pytest.approx(max(raw[1][0], 2*raw[0][0]))
    assert found["c"].sure and not found["b"].sure
    assert recommendation([*found.values()], "new/loss").startswith("**b**: new/loss")   # not surely worse, and a third of the cost


def test_a_best_rate_at_the_end_of_those_tried_is_said():
    def found(best: dict) -> list:
        rates = ["0.001", "0.004", "0.016", "0.064"]
        loss = {(rank, rate): abs(np.log(float(rate)/best[rank])) for rank in best for rate in rates}
        rows = table_of({key: ([value]*3, [value + .1*seed for seed in range(3)]) for key, value in loss.items()})
        return settings_of(rows, dict(rank=[*best], learning_rate=rates), "new/loss_reported")
    assert [s.edge for s in found({"4": .004, "16": .017})] == ["", ""] and "beyond" not in recommendation(found({"4": .004, "16": .017}), "new/loss")
    ends = found({"4": .06, "16": .0001, "8": .005})
    assert {s.name: s.edge for s in ends} == {"4": "largest", "16": "smallest", "8": ""}
    assert "The smallest learning rate that was tried is best for 16 and the largest learning rate that was tried is best for 4: one beyond" in recommendation(ends, "new/loss")
    assert [edge_of("low", ["low", "high"]), edge_of("1", ["1"])] == ["first", ""]


@pytest.mark.slow
def test_the_analysis_notebook_reads_any_study(tmp_path, capfd):
    "Also one of an earlier version, whose runs had neither adapters nor halves; by the command, and as papermill does it"
    folder = Path(shutil.copytree(Path(__file__).parent/"earlier_study", tmp_path/"study"))
    assert peer_ablate(["report", str(folder), "--notebook"]) == 0
    assert "analysis.html" in capfd.readouterr().out
    cells = nbformat.read(folder/"analysis.ipynb", as_version=4).cells
    said = "\n".join(str(output.get("data", {})) for cell in cells if cell.cell_type == "code" for output in cell.outputs)
    assert "surely worse than the best" in said and not [o for c in cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    page = (folder/"analysis.html").read_text()
    assert "Recommendation" in page and "index.html" in page
