"Who shares a seed: what a study file may say, what is planned of it, and that plans of before are what they were."
import json

import numpy as np
import pytest

from peer_nb.config import config_from_dict
from peer_nb.files import UserError
from peer_nb.findings.effects import design_of
from peer_nb.findings.verdicts import evaluate_claims
from peer_nb.running.estimates import detectable_effects
from peer_nb.running.seed_outlook import NoiseParts
from peer_nb.study.plan import load_plan, make_plan, matching
from peer_nb.study.study import load_study

from test_ablation import BASE, STUDY, write_study

AXES = {"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}}, "rate": {"low": {}, "high": {"train_config.learning_rate": 0.02}},
        "decay": {"none": {"train_config.weight_decay": 0.0}, "some": {"train_config.weight_decay": 0.3}}}


def planned(folder, **changes):
    work = write_study(folder, {**STUDY, "axes": AXES, **changes})
    return make_plan(load_study(work/"study.yaml"), config_from_dict(json.loads(json.dumps(BASE))), fingerprint=lambda c: "text")


def test_seeds_are_shared_as_the_file_says(tmp_path):
    values, found = [42, 43], {}
    for pairing in ("common", "distinct", "blocks"):
        plan = planned(tmp_path/pairing, seeds=dict(pairing=pairing, values=values))
        found[pairing] = len({c.seed for c in plan.cells}), len(plan.cells), design_of([c.levels | {"seed": c.seed} for c in plan.cells], plan.axes).variance
        for n, c in enumerate(plan.cells):
            twins = [o for o in plan.cells if o.seed == c.seed and o is not c]
            if pairing == "blocks": assert [all(o.levels[a] != c.levels[a] for a in AXES) for o in twins] == [True]
        assert {m.quantity: m.mismatch for m in matching(plan) if m.axis == "heads"}["active parameters"] > 0
    assert found == dict(common=(2, 16, "seeds"), distinct=(16, 16, "runs"), blocks=(8, 16, "runs"))


def test_a_plan_that_does_not_use_it_keeps_its_hash(tmp_path):
    "A list of seeds and common pairing are one plan, and the frozen plan of an earlier version is still whole"
    claims = [dict(name="c", a={"heads": "two"}, b={"heads": "four"})]
    plain, said = (planned(tmp_path, seeds=seeds, claims=claims) for seeds in ([1, 2], dict(pairing="common", values=[1, 2])))
    assert plain.hash == said.hash
    from test_run_files import EARLIER
    earlier = load_plan(EARLIER)
    assert {*plain.study} == {*earlier.study} and {*plain.study["claims"][0]} == {*earlier.study["claims"][0]}


@pytest.mark.parametrize("change, said", [(dict(seeds=dict(pairing="block", values=[1])), "seeds.pairing: 'block' is not allowed"), (dict(seeds=dict(paring="blocks")), "seeds.paring: unknown key"),
    (dict(seeds=dict(pairing="blocks", values=[1]), design="one_factor"), "need a full design"), (dict(seeds=dict(pairing="blocks", values=[1, 1])), "duplicates"), (dict(pairing="blocks"), "pairing: unknown key"),
    (dict(seeds=dict(pairing="blocks", values=[1]), axes={"heads": AXES["heads"], "rate": {**AXES["rate"], "third": {"train_config.learning_rate": 0.03}}}), "heads: 2, rate: 3")])
def test_what_cannot_be_shared_is_refused(change, said, tmp_path):
    with pytest.raises(UserError, match="study.yaml, line") as e: planned(tmp_path, **change)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_plan_says_what_blocks_and_distinct_seeds_can_see(tmp_path):
    "At the same sixteen runs; the numbers are those of the noncentral t"
    smallest = {}
    for pairing in ("common", "blocks", "distinct"):
        lines = detectable_effects(planned(tmp_path/pairing, seeds=dict(pairing=pairing, values=[1, 2])), NoiseParts(run=0.012))
        smallest[pairing] = float(next(l for l in lines if "heads:" in l).split(": ")[1].split()[0])
    assert smallest["blocks"] < 0.025 < 0.09 < smallest["common"] and smallest["distinct"] <= smallest["blocks"]


def test_claims_of_blocks_are_judged_with_the_noise_of_runs(tmp_path):
    rng, claim = np.random.default_rng(0), dict(name="c", a={"heads": "two"}, b={"heads": "four"}, metric="words/bits_per_byte", direction="minimize")
    joint = dict(name="j", a={"heads": "two", "rate": "high"}, b={"heads": "four", "rate": "high"}, metric="words/bits_per_byte", direction="minimize")
    plan = planned(tmp_path, seeds=dict(pairing="blocks", values=[1, 2]), claims=[claim, joint])
    mood = {c.seed: rng.normal(0, .1) for c in plan.cells}
    rows = [dict(c.levels, run=c.id, seed=c.seed, state="DONE", **{"words/bits_per_byte": 3 - .1*(c.levels["heads"] == "two") + mood[c.seed] + rng.normal(0, .01)}) for c in plan.cells]
    first, second = evaluate_claims(plan.study["claims"], rows, plan.axes)
    assert first.status == "SUPPORTED" and first.found.degrees > 3
    assert second.status == "INCONCLUSIVE" and "cannot tell it from what their seeds do" in second.said
