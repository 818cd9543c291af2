"Seeds that are added until claims are decided: the levels of the looks, which runs are called for, and a study that is stopped between them."
import json
from collections import Counter
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from peer_nb.config import config_from_dict
from peer_nb.files import UserError, read_json
from peer_nb.findings.effects import interactions, whole_rounds
from peer_nb.findings.results import load_runs
from peer_nb.findings.rounds import next_round
from peer_nb.findings.simulated_studies import World, grown_studies
from peer_nb.findings.study_page import study_page
from peer_nb.findings.summary import summary_lines
from peer_nb.findings.verdicts import study_findings
from peer_nb.running import command as runner
from peer_nb.running.estimates import plan_text
from peer_nb.running.local import Event
from peer_nb.sequential import Looks, chance_to_decide, look_levels
from peer_nb.study.plan import cell_rounds, load_plan, make_plan
from peer_nb.study.run import Result, Run
from peer_nb.study.study import load_study

from test_ablation import BASE, STUDY, call, write_study

AXES = {"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}, "one": {"model_config.peer_config.num_heads": 1}}}
CLAIMS = [dict(name="two heads are worse", a={"heads": "two"}, b={"heads": "four"}, metric="words/bits_per_byte", direction="maximize"),
          dict(name="one head is worse", a={"heads": "one"}, b={"heads": "four"}, metric="words/bits_per_byte", direction="maximize")]
ROUNDS = dict(seeds=dict(first=2, most=6), axes=AXES, claims=CLAIMS)
# what a level adds: two heads are far off, one head hardly
TRUTH, NOISE = {"four": 0.0, "two": 1.0, "one": 0.03}, 0.02


RUN_CELLS = runner.run_cells


class Instant:
    "A launcher whose runs are done at once; it may be interrupted, and some of its runs fail"
    slots, farewell = 1, ""

    def __init__(self, folder, left=10**9, broken=()): self.folder, self.left, self.broken, self.queue, self.made = folder, left, broken, [], []
    @property
    def busy(self): return bool(self.queue)
    def submit(self, cells): self.queue += cells
    def stop(self): self.queue = []

    def look(self):
        if self.left == 0: raise KeyboardInterrupt
        cell, self.left = self.queue.pop(0), self.left - 1
        run = Run.of(self.folder, cell.id).make()
        noise = np.random.default_rng([cell.seed, len(cell.levels["heads"]), ord(cell.levels["heads"][0])]).normal(0, NOISE)
        if cell.id in self.broken or cell.levels["heads"] in self.broken: run.write_status(state="FAILED", exit_code=1, error={"class": "ValueError", "kind": "code", "message": "on purpose"})
        else:
            Result({"words/bits_per_byte": 3 + TRUTH[cell.levels["heads"]] + noise + cell.seed/50}).write(run.folder)
            run.write_status(state="DONE", exit_code=0)
        self.made.append(cell.id)
        return [Event("ended", cell.id)]


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys):
    "A function that starts or continues such a study: exit code, what was said, folder, the launcher"
    def go(*words, name="a", study=ROUNDS, at=None, **how):
        made, here = [], at or tmp_path
        monkeypatch.setattr(runner, "launcher_for", lambda folder, *_: made.append(Instant(folder, **how)) or made[-1])
        monkeypatch.setattr("peer_nb.findings.study_page.write_report", lambda runs: runs.folder/"index.html")
        monkeypatch.setattr(runner, "run_cells", partial(RUN_CELLS, pause=0.0))   # nobody waits for runs that are done at once
        work = here/name
        if not (work/"study.yaml").exists(): write_study(work, {**STUDY, **study})
        asked = words if "--resume" in words else ["--study", work/"study.yaml", "--gpus", 0, "--fresh", *words]
        code, out, err = call(capsys, *asked, "--output-dir", work/"out")
        folders = [*(work/"out").glob("tiny-*")]
        return code, out + err, folders[0] if folders else None, made[0] if made else None
    return go


@pytest.fixture
def whole(lab, tmp_path_factory, shared={}):
    "The same study, run to its end once for all tests that only read it"
    if not shared: shared["study"] = lab(at=tmp_path_factory.mktemp("whole"))
    return shared["study"]


def test_levels_are_what_walks_of_noise_show():
    "Unequal looks against a million steps of noise; and the published bounds of four looks, 4.333, 2.963, 2.359, 2.014"
    assert np.allclose(stats.norm.isf(look_levels(np.arange(1, 5)/4, [.05])[0]/2), [4.3326, 2.9631, 2.3590, 2.0141], atol=6e-4)
    shares, rng = np.array([.4, .5, .9, 1.0]), np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((250_000, 4))*np.sqrt(np.diff(shares, prepend=0)), 1)/np.sqrt(shares)
    for spending in ("obrien_fleming", "pocock"):
        bounds = stats.norm.isf(look_levels(shares, [.05], spending)[0]/2)
        assert abs((abs(walk) > bounds).any(1).mean() - .05) < 4*(.05*.95/250_000)**.5


def test_a_sequential_p_holds_at_every_level():
    looks, rng = Looks(3, 6, "pocock"), np.random.default_rng(1)
    z = np.cumsum(rng.standard_normal((40_000, 6)), 1)/np.sqrt(np.arange(1, 7))
    p = np.min([looks.p_value(n, 2*stats.norm.sf(abs(z[:, n - 1]))) for n in range(3, 7)], 0)
    for level in (.01, .05, .2): assert abs((p <= level).mean() - level) < 4*(level*(1 - level)/40_000)**.5
    assert looks.p_value(6, 1.0) == 1 and looks.p_value(3, 0.0) < 1e-9


def test_a_chance_at_the_end_is_none_or_all():
    assert chance_to_decide(3.0, 1.0, 50, 1.0, .05) == pytest.approx(1) and chance_to_decide(1.0, 1.0, 50, 1.0, .05) == pytest.approx(0)


def test_a_study_stops_when_it_is_decided(whole):
    "The clear claim is decided early and its arm is not run on; the other goes on, to the end or until it is hopeless"
    code, out, folder, made = whole
    runs = load_runs(folder)
    clear, small = study_findings(runs)
    seeds = Counter(c.levels["heads"] for c in runs.plan.cells)
    assert code == 0 and clear.status == "SUPPORTED" and f"with {seeds['two']} seeds" in clear.said and seeds["two"] < seeds["one"] == seeds["four"] <= 6
    assert {*made.made} == {c.id for c in runs.plan.cells} and len(made.made) == len({*made.made})
    record = read_json(folder/"rounds.json")["rounds"]
    assert 3*2 + sum(len(entry["runs"]) for entry in record) == len(runs) and "one head is worse" in record[-1]["undecided"]
    assert f"{len(runs)} of 18 runs" in out and next_round(runs) == ([], [])
    assert len(load_plan(folder).cells) == 18 and runs.plan.hash == load_plan(folder).hash
    page = study_page(runs)
    assert clear.said in page and "after a round of seeds" in page and f"{len(runs)} of 18 runs" in page
    assert any(clear.said in line for line in summary_lines(runs.rows, runs.plan, runs))
    again = load_study(folder/"study.yaml")
    assert again.rounds == Looks(2, 6) and again.seeds == load_plan(folder).study["seeds"]


def test_it_goes_on_from_wherever_it_was_stopped(lab, whole):
    "Interrupted after each number of runs, in a round and between two, and continued: the same runs, each once, and the same verdicts"
    told = [(f.status, f.said) for f in study_findings(load_runs(whole[2]))]
    for left in (4, 9):
        code, out, folder, first = lab(name=f"cut{left}", left=left)
        assert code == 130 and "stopped" in out and len(first.made) == left
        code, out, _, second = lab("--resume", name=f"cut{left}")
        assert code == 0 and sorted(first.made + second.made) == sorted(whole[3].made), out
        assert [(f.status, f.said) for f in study_findings(load_runs(folder))] == told


def test_an_arm_that_fails_is_given_up_and_names_itself(lab):
    code, out, folder, made = lab(broken=("two",))
    first, second = study_findings(load_runs(folder))
    assert code == 1 and first.status == "INCONCLUSIVE" and "not usable" in first.said
    assert Counter(c.levels["heads"] for c in load_runs(folder).plan.cells)["two"] == 2 < len(made.made)/3


def test_one_lost_run_delays_and_is_told(lab, whole):
    lost = next(c.id for c in load_plan(whole[2]).cells if c.levels["heads"] == "two")
    code, _, folder, _ = lab(broken=(lost,))
    clear = study_findings(load_runs(folder))[0]
    assert code == 1 and clear.status == "SUPPORTED" and lost in clear.said


def test_nothing_is_judged_before_the_first_look(lab):
    _, _, folder, _ = lab(left=3)
    found = study_findings(load_runs(folder))
    assert [f.status for f in found] == ["TODO" if not f.pairs else "PARTIAL" for f in found] and all(f.p is None and "not looked at before 2 seeds" in f.said for f in found)
    study_page(load_runs(folder))


def test_a_plan_tells_how_many_runs_it_may_take(tmp_path):
    work = write_study(tmp_path, {**STUDY, **ROUNDS})
    plan = make_plan(load_study(work/"study.yaml"), config_from_dict(json.loads(json.dumps(BASE))), fingerprint=lambda c: "text")
    text = plan_text(plan)
    assert "runs: 6 at first, 18 at most" in text and "runs are to be expected" in text and "18 runs at most" in text
    assert [*cell_rounds(plan).values()] == [*range(1, 7)]*3


@pytest.mark.parametrize("change, said", [(dict(seeds=dict(first=4, most=2)), "seeds.most: 2 leaves no seed"), (dict(seeds=dict(most=2)), "seeds.first: is missing"), (dict(claims=[]), "this study has no claims"),
                                          (dict(claims=[{**CLAIMS[0], "over": "items"}]), "over items")])
def test_what_cannot_be_grown_is_refused(change, said, tmp_path):
    work = write_study(tmp_path, {**STUDY, **ROUNDS, **change})
    with pytest.raises(UserError, match="study.yaml, line") as e: load_study(work/"study.yaml")
    assert said in str(e.value) and "\n" not in str(e.value)


def test_seeds_of_the_command_line_contradict_rounds(lab):
    code, out, folder, _ = lab("--seeds", 1, 2)
    assert code == 2 and "leave out --seeds" in out and folder is None


@pytest.mark.parametrize("pairing, spending, share", [("common", "obrien_fleming", .7), ("common", "pocock", .6), ("blocks", "obrien_fleming", .6)])
def test_a_sample_of_studies_that_grow(pairing, spending, share):
    "300 studies of nothing with three claims: SUPPORTED within three standard errors of 5 %; and twice the noise in 60 % of the runs, but for common seeds and little at early looks"
    rng, looks = np.random.default_rng(3), Looks(2, 8, spending)
    nothing = grown_studies(rng, 300, World("full 2×2×2", 8, pairing, .5), looks, 3)
    clear = grown_studies(rng, 300, World("full 2×2×2", 8, pairing, effect=.024), looks)
    assert nothing["false"] <= .05 + 3*(.05*.95/300)**.5 and clear["found"] > .95
    assert clear["runs"] <= share


@pytest.mark.slow
@pytest.mark.parametrize("design, pairing", [("full 2×2×2", "common"), ("full 2×2×2", "distinct"), ("full 2×2×2", "blocks"), ("list of 4", "common"), ("full 3×2", "common"), ("one factor 3, 3, 2", "distinct")])
@pytest.mark.parametrize("most, spending", [(4, "obrien_fleming"), (8, "obrien_fleming"), (8, "pocock")])
def test_the_whole_grid_of_studies_that_grow(design, pairing, most, spending):
    "False SUPPORTED of all claims together over the whole sequence, 5,000 studies a world"
    looks, claims = Looks(2, most, spending), 1 if design == "list of 4" else 3
    false = {str(kind): grown_studies(np.random.default_rng([most, n]), 5000 if not kind[1] else 1000, World(design, most, pairing, *kind), looks, claims)["false"]
             for n, kind in enumerate([(0, 0, False), (.5, 0, False), (1, 0, False), (0, 0, True), (.5, .15, False)])}
    assert max(false.values()) <= .05 + 2*(.05*.95/1000)**.5 and np.mean([*false.values()]) <= .05, false


@pytest.mark.slow
@pytest.mark.parametrize("pairing, spending", [("blocks", "obrien_fleming"), ("distinct", "obrien_fleming"), ("common", "pocock")])
def test_a_clear_effect_takes_60_percent_of_the_runs(pairing, spending):
    found = grown_studies(np.random.default_rng(4), 5000, World("full 2×2×2", 8, pairing, effect=.024), Looks(2, 8, spending))
    assert found["runs"] <= .6 and found["found"] > .99


def test_an_interaction_that_is_looked_at_each_round_pays_for_it():
    "100 studies of nothing, stopped by whoever likes the interaction: at most 5 % have one, where its plain p has one in more; a round that is not over counts for no combination"
    rng, looks, axes, found = np.random.default_rng(8), Looks(2, 6), {"x": ["0", "1"], "z": ["0", "1"]}, []
    for _ in range(100):
        rows = [dict(run=f"{x}{z}{s}", x=x, z=z, seed=4*s + n, state="DONE", loss=rng.normal()) for s in range(6) for n, (x, z) in enumerate(product("01", "01"))]
        both = [[interactions(pd.DataFrame(rows[:4*n]), axes, "loss", how)[0]["p"] for n in range(2, 7)] for how in (looks, None)]
        found.append([min(p) <= .05 for p in both])
    counted, plain = np.mean(found, 0)
    assert counted <= .05 + 3*(.05*.95/100)**.5 < plain, (counted, plain)
    rows[-1]["state"] = "RUNNING"
    assert whole_rounds(rows, axes, looks) == (rows[:20], 5) and whole_rounds(rows[:4], axes, looks) == (rows[:4], 0)
    rows[-1]["state"] = "FAILED"
    assert whole_rounds(rows, axes, looks)[1] == 6 and whole_rounds(rows[:-4] + rows[-3:], axes, looks)[1] == 5
