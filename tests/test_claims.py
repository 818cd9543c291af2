"What the lab says about worlds that are known: nothing where nothing is, and what is there as often as the plan promised."
import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from peer_nb.study.claims import read_claims
from peer_nb.findings.verdicts import ALPHA, evaluate_claims, study_findings
from peer_nb.running.estimates import detectable_effects, estimated_memory
from peer_nb.running.seed_outlook import NoiseParts
from peer_nb.study.plan import load_plan, make_plan, matching, run_id, save_plan
from peer_nb.study.run import file_name
from peer_nb.findings.study_page import match_sentences
from peer_nb.findings.results import COLUMNS, load_runs
from peer_nb.findings.effects import contrast, effects_table, interactions
from peer_nb.stats import compare, holm, power
from peer_nb.study.study import combinations, load_study
from peer_nb.config import config_from_dict, load_config
from peer_nb.files import UserError, write_json

from test_ablation import BASE, STUDY, call, write_study

AXES = {"heads": {"1": {}, "2": {}, "4": {}}, "mix": {"x": {}, "y": {}}}
CLAIMS = [dict(name=f"{a} against {b}", a={"heads": a}, b={"heads": b}) for a, b in (("4", "1"), ("2", "1"), ("4", "2"))]


def claims_of(given=CLAIMS, **more):
    return [{**c, "metric": "words/loss", "direction": "minimize", **more} for c in read_claims(given, AXES, "study.yaml")]


def world(rng, seeds, effect=0.0, noise=1.0):
    "Runs of a study: the seed and the mix move all of them, four heads are better by the effect"
    mood = {s: 3*rng.standard_normal() for s in seeds}
    return [dict(run=f"{h}{m}{s}", heads=h, mix=m, seed=s, state="DONE", **{"words/loss": 3 - effect*(h == "4") + 0.5*(m == "y") + mood[s] + noise*rng.standard_normal()})
            for h, m, s in itertools.product(AXES["heads"], AXES["mix"], seeds)]


def supported(rng, count, seeds, effect, claims) -> np.ndarray:
    return np.array([[f.status == "SUPPORTED" for f in evaluate_claims(claims, world(rng, seeds, effect), AXES)] for _ in range(count)])


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_thousand_studies_of_nothing(seeds):
    "At most 5 % of them may support any of their claims"
    share = supported(np.random.default_rng(seeds), 1000, range(seeds), 0.0, claims_of()).any(1).mean()
    assert share <= ALPHA, share


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 4, 8])
def test_ten_thousand_studies_of_nothing(seeds):
    "Either wrong verdict, SUPPORTED or REFUTED, about the boundary of a least effect"
    rng, claims, wrong = np.random.default_rng(100 + seeds), claims_of(), []
    for _ in range(10_000):
        wrong.append(any(f.status in ("SUPPORTED", "REFUTED") for f in evaluate_claims(claims, world(rng, range(seeds)), AXES)))
    assert np.mean(wrong) <= ALPHA + 3*math.sqrt(ALPHA*(1 - ALPHA)/10_000)


@pytest.mark.parametrize("seeds, effect", [(3, 2.5), (5, 1.5)])
def test_power_is_what_was_predicted(seeds, effect):
    "One claim alone: the noncentral t; as one of three: between what Bonferroni and no correction would find"
    rng, sd = np.random.default_rng(seeds), math.sqrt(2/2)
    alone = supported(rng, 1000, range(seeds), effect, claims_of()[:1])[:, 0].mean()
    expected = power(effect, sd, seeds)
    assert abs(alone - expected) < 3*math.sqrt(expected*(1 - expected)/1000)
    together = supported(rng, 1000, range(seeds), effect, claims_of())[:, 0].mean()
    assert power(effect, sd, seeds, ALPHA/3) - 0.05 < together < expected + 0.05


def test_the_effect_that_the_plan_says_it_can_see_is_seen_in_four_studies_of_five(tmp_path):
    work = write_study(tmp_path, {**STUDY, "seeds": [1, 2, 3], "axes": {"heads": {h: {"model_config.peer_config.num_heads": int(h)} for h in ("1", "4")}, "mix": {"x": {}, "y": {"train_config.learning_rate": 0.02}}}})
    study = load_study(work/"study.yaml")
    plan = make_plan(study, config_from_dict(json.loads(json.dumps(BASE))), fingerprint=lambda c: "text")
    line = next(l for l in detectable_effects(plan, NoiseParts(run=1.0)) if l.strip().startswith("heads"))
    effect = float(re.search(r"heads: ([\d.]+) alone", line)[1])
    found = supported(np.random.default_rng(1), 1000, (1, 2, 3), effect, claims_of()[:1])[:, 0].mean()
    assert abs(found - 0.8) < 3*math.sqrt(0.8*0.2/1000) + 0.005


def test_effects_and_interactions_are_scipy_s():
    rows = pd.DataFrame(world(np.random.default_rng(9), (1, 2, 3, 4), 0.3))
    axes = {a: list(l) for a, l in AXES.items()}
    table = effects_table(rows, axes, "words/loss").set_index("level")
    wide = rows.pivot_table(index="seed", columns="heads", values="words/loss")
    for level in ("2", "4"):
        theirs = stats.ttest_rel(wide[level], wide["1"])
        assert np.allclose([table.p[level], table.low[level], table.high[level]], [theirs.pvalue, *theirs.confidence_interval()])
    cube = rows.pivot_table(index="seed", columns=["heads", "mix"], values="words/loss")
    found = {(e["level"], e["other"]): e for e in interactions(rows, axes, "words/loss")}
    assert np.isclose(found["4", "y"]["p"], stats.ttest_1samp((cube["4", "y"] - cube["1", "y"]) - (cube["4", "x"] - cube["1", "x"]), 0).pvalue)


def test_a_seed_or_its_order_changed_in_a_reused_run_is_in_no_pair():
    rows = world(np.random.default_rng(0), (1, 2))
    rows[0] |= {"state": "REUSE", "reuse_differs": None}
    assert len(contrast(rows, AXES, "words/loss", {"heads": "4"}, {"heads": "1"}).pairs) == 4
    rows[0]["reuse_differs"] = "train_config.seed"
    found = contrast(rows, AXES, "words/loss", {"heads": "4"}, {"heads": "1"})
    assert len(found.pairs) == 3 and found.lost == [rows[0]["run"]]


@pytest.fixture
def finished(tmp_path):
    "A finished study on disk whose effect is known, with claims and a run that fell after its peak"
    claims = [dict(name="two heads are worse", a={"heads": "four"}, b={"heads": "two"}, min_effect=0.05), dict(name="rate matters", a={"rate": "low"}, b={"rate": "high"})]
    axes = {"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}}, "rate": STUDY["axes"]["rate"]}
    work = write_study(tmp_path, {**STUDY, "axes": axes, "claims": claims, "seeds": [1, 2, 3]})
    study, folder, rng = load_study(work/"study.yaml"), tmp_path/"out", np.random.default_rng(2)
    plan = make_plan(study, config_from_dict(json.loads(json.dumps(BASE))), fingerprint=lambda c: "text")
    (folder/"runs").mkdir(parents=True)
    save_plan(plan, folder)
    for cell in plan.cells:
        run, value = folder/"runs"/cell.id, 3 - 0.2*(cell.levels["heads"] == "four") + 0.1*cell.seed + 0.005*rng.standard_normal()
        run.mkdir()
        (run/"metrics.jsonl").write_text(json.dumps({"step": 5, "tokens": 320, "loss": 4.0, "eval/words/bits_per_byte": value - 0.4*(cell.seed == 2)}) + "\n")
        write_json(run/"status.json", dict(state="DONE", exit_code=0, seconds=2.0))
        write_json(run/"result.json", dict(metrics={"words/bits_per_byte": value}, heldout={"words": {"bits_per_byte_se": 0.01}}, training=dict(steps=10, tokens=640, seconds=1.0), environment=dict(device="cpu")))
    return folder, plan


def test_claims_from_folders(finished):
    folder, plan = finished
    assert {c["name"]: c["metric"] for c in load_plan(folder).study["claims"]} == {"two heads are worse": "words/bits_per_byte", "rate matters": "words/bits_per_byte"}
    assert [f.status for f in study_findings(load_runs(folder))] == ["SUPPORTED", "INCONCLUSIVE"]
    write_json(folder/"runs"/plan.cells[0].id/"status.json", dict(state="FAILED", exit_code=1, error={"class": "ValueError", "message": "x"}))
    found = study_findings(load_runs(folder))
    assert [f.status for f in found] == ["SUPPORTED", "INCONCLUSIVE"] and f"not usable: {plan.cells[0].id}" in found[0].said
    (folder/"runs"/plan.cells[0].id/"status.json").unlink()
    assert [f.status for f in study_findings(load_runs(folder))] == ["PARTIAL", "PARTIAL"]


def test_the_table_has_peak_final_and_degradation_as_documented(finished):
    folder, plan = finished
    table, long = pd.read_csv(load_runs(folder).write_csv()), pd.read_parquet(load_runs(folder).write_parquet())
    name = "words/bits_per_byte"
    fell = table[table.seed == 2]
    assert np.allclose(fell[f"{name}:degradation"], 0.4) and (fell[f"{name}:peak_step"] == 5).all() and (table[table.seed != 2][f"{name}:degradation"] == 0).all()
    assert {c for c in table if "/" not in c and c not in plan.axes} == {c for c in COLUMNS if "METRIC" not in c and c not in ("AXIS", "token_share")}   # no axis is halved
    assert {c.replace(name, "METRIC") for c in table if "/" in c} == {c for c in COLUMNS if "METRIC" in c}
    for kind in ("peak", "degradation", "se"):
        assert np.allclose(long[long.kind == kind].sort_values("run").value, table.sort_values("run")[f"{name}:{kind}"])


HEADS = STUDY["axes"]["heads"]
WRONG = [(dict(budget={"tokens": 0}), "tokens: 0", "budget.tokens: 0 is not allowed"), (dict(seeds=[1, 1]), "seeds:", "duplicates"), (dict(desing="full"), "desing", "did you mean design?"),
         (dict(axes={"heads": {**HEADS, "again": {"model_config.peer_config.num_heads": 2}}}), "again:", "the same configuration as level 'two'"),
         (dict(axes={"heads": {**HEADS, "odd": {"model_config.peer_config.num_head": 2}}}), "odd:", "axis 'heads', level 'odd'"), (dict(axes={"heads": {}}), "heads: {}", "has no levels"),
         (dict(constraints=[dict(drop={"head": "two"}, reason="x")]), "head: two", "unknown axis 'head'; did you mean 'heads'?"),
         (dict(constraints=[dict(drop={"rate": ["low", "high"]}, reason="all of them")]), "constraints:", "no cell is left"),
         (dict(claims=[dict(name="c", a={"rate": "lo"}, b={"rate": "high"})]), "rate: lo", "unknown level of rate 'lo'; did you mean 'low'?"),
         (dict(claims=[dict(name="c", a={"rate": "low"}, b={"rate": "high"}, metric="docs/loss")]), "claims:", "metric 'docs/loss' will not be measured"),
         (dict(primary={"metric": "docs/loss"}), "metric: docs/loss", "will not be measured"), (dict(notebook="nowhere.ipynb"), "notebook:", "no such template"),
         (dict(axes={"heads": {1: {}, "1": HEADS["two"]}}), "'1':", "there twice, once as a number and once as text"), (dict(axes={"heads": {"NA": {}, "two": HEADS["two"]}}), "NA: {}", "read as an empty cell"),
         (dict(axes={"heads": {"None": {}, "two": HEADS["two"]}}), "None: {}", "read as an empty cell"), (dict(axes={"optimizer/rate": HEADS}), "optimizer/rate:", "a slash in a column's name"), (dict(axes={"column": HEADS}), "column:", "a column of this name"),
         (dict(base_config="missing.yaml"), "base_config:", "missing.yaml: cannot be read"), (dict(budget={"matched": "wall_time"}), "budget:", "budget.seconds: is missing")]


@pytest.mark.parametrize("change, stands, said", WRONG)
def test_a_mistake_is_shown_with_its_line(change, stands, said, tmp_path, capsys):
    work = write_study(tmp_path, {**STUDY, **change})
    before, lines = sorted(work.rglob("*")), (work/"study.yaml").read_text().splitlines()
    code, out, err = call(capsys, "--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0)
    line = next(n for n, text in enumerate(lines, 1) if stands in text)
    near = {line, line + 1} if stands.endswith("claims:") else {line}
    assert code == 2 and said in err and err.count("\n") == 1 and any(f"study.yaml, line {n}:" in err for n in near), err
    assert sorted(work.rglob("*")) == before


def test_a_plan_tells_cost_sight_reuse_and_writes_nothing(tmp_path, capsys):
    work = write_study(tmp_path, {**STUDY, "seeds": [1, 2, 3], "constraints": [dict(drop={"heads": "two", "rate": "high"}, reason="diverges")], "claims": [dict(name="low is better", a={"rate": "low"}, b={"rate": "high"}, min_effect=0.01)]})
    before = sorted(work.rglob("*"))
    shown = [call(capsys, *words, "--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0) for words in (["plan"], ["run", "--dry-run"])]
    assert shown[0] == shown[1] and shown[0][0] == 0
    out = shown[0][1]
    for said in ("learning_rate: 0.02", "9 runs; ", "time: not known", "equal tokens", "3 seeds, power 80 %", "claim: low is better", "left out: heads 'two', rate 'high': diverges"): assert said in out, out
    assert sorted(work.rglob("*")) == before


def test_one_number_spelled_in_two_ways_is_one_level_and_refused(tmp_path):
    work = write_study(tmp_path)
    text = yaml.safe_dump({**STUDY, "axes": {"rate": {"FIRST": {}, "SECOND": {"train_config.learning_rate": 0.02}}}})
    (work/"study.yaml").write_text(text.replace("FIRST", "0.001").replace("SECOND", "1e-3"))
    with pytest.raises(UserError, match="the key 1e-3 is there twice"): load_study(work/"study.yaml")


def test_names_that_no_file_system_takes_are_cut_and_stay_apart(tmp_path):
    "Twelve axes with level names in words, and a study's name of 300 letters"
    levels = [{f"axis {n}": f"another {'long ' * 8}name {n + k}" for n in range(12)} for k in range(2)]
    ids = [run_id(1, l, 42) for l in levels]
    assert ids[0] != ids[1] and all(len(name) < 130 and name.startswith("001-") and name.endswith("-seed42") for name in ids)
    assert run_id(3, {"mix": "docs+source", "setup": "128×128", "heads": "4 heads × 8"}, 42) == "003-docs+source-128x128-4headsx8-seed42"
    names = [file_name(letter*300) for letter in "nm"] + [file_name("n"*299 + "/")]
    assert len({*names}) == 3 and all(len(name) <= 80 for name in names) and file_name("a study/of: mine") == "a-study-of-mine"


def test_no_cell_of_the_table_is_a_formula(finished):
    folder, plan = finished
    runs = load_runs(folder)
    next(iter(runs)).write_status(state="FAILED", exit_code=1, error={"class": "E", "kind": "code", "message": "=HYPERLINK(1)"})
    back = pd.read_csv(load_runs(folder).write_csv())
    assert back.error[0] == "'=HYPERLINK(1)" and not any(str(v).startswith(("=", "+", "-", "@")) for v in back.select_dtypes("str").stack())


def test_a_longer_context_is_no_equal_condition(tmp_path):
    "At equal tokens, twice the context halves the optimizer steps and doubles the window of held-out text"
    axes = {"context": {"short": {}, "long": {"dataset_config.max_seq_length": 64}}}
    work = write_study(tmp_path, {**STUDY, "axes": axes}, {**BASE, "dataset_config": {**BASE["dataset_config"], "max_seq_length": 32}})
    plan = make_plan(load_study(work/"study.yaml"), load_config(work/"base.yaml"), fingerprint=lambda c: "text")
    found = {m.quantity: (m.low, m.high) for m in matching(plan) if m.axis == "context"}
    assert found["tokens"] == (640, 640) and found["optimizer steps"] == (10, 20) and found["held-out window"] == (32, 64)
    assert "optimizer steps by 2×" in match_sentences(plan)[-1][0] and "held-out window by 2×" in match_sentences(plan)[-1][0]


def test_a_study_file_without_seeds_has_three(tmp_path):
    work = write_study(tmp_path, {k: v for k, v in STUDY.items() if k != "seeds"})
    plan = make_plan(load_study(work/"study.yaml"), config_from_dict(json.loads(json.dumps(BASE))), fingerprint=lambda c: "text")
    assert sorted({c.seed for c in plan.cells}) == [42, 43, 44] and len(plan.cells) == 12


@pytest.mark.parametrize("design, away", [("one_factor", 1), ("pairs", 2), ("leave_one_out", 1)])
def test_designs_are_the_part_of_the_full_one_near_the_reference(design, away):
    axes = {a: dict.fromkeys(range(n)) for a, n in zip("abcd", (2, 3, 1, 4))}
    reference = {a: list(l)[-1 if design == "leave_one_out" else 0] for a, l in axes.items()}
    assert combinations(axes, design) == [c for c in combinations(axes, "full") if sum(c[a] != reference[a] for a in axes) <= away]


def test_memory_is_what_autograd_keeps_to_a_factor_of_two():
    import torch
    from peer_nb.analysis.parameters import count_parameters
    from peer_nb.config import to_dict
    from peer_nb.models.causal_lm import PeerMLAConfig, PeerMLAForCausalLM
    sizes = dict(hidden_size=128, num_hidden_layers=3, intermediate_size=352, vocab_size=2048, max_position_embeddings=128)
    config = config_from_dict({**json.loads(json.dumps(BASE)), "model_config": {**BASE["model_config"], **sizes}, "dataset_config": {**BASE["dataset_config"], "max_seq_length": 128}})
    model, kept = PeerMLAForCausalLM(PeerMLAConfig(**to_dict(config)["model_config"])), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    ids = torch.randint(0, 2048, (1, 128))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.setdefault(t.untyped_storage().data_ptr(), t), t)[1], lambda t: t): model(ids, labels=ids)
    saved = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    counted = count_parameters(config.model_config, 128).to_dict()
    assert 0.5 < (estimated_memory(config, counted) - 16*counted["total"])/saved < 2
