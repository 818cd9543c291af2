"The linear model of a design against programs that we did not write, and what the rule of its noise promises."
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from peer_nb.factorial import balanced_blocks, chance_to_find, factor_columns, precision, smallest_found, weights
from peer_nb.findings.effects import design_of, effect, results_of
from peer_nb.stats import added_noise, compare

# four designs with effects, errors, p and intervals as statsmodels 0.15 gives them (ols with Sum coding, two-way interactions, C(seed))
ORACLE = json.loads((Path(__file__).parent/"factorial_oracle.json").read_text())


@pytest.mark.parametrize("case", ORACLE, ids=lambda c: f"{c['sizes']}-{len(c['lost'])}-lost")
def test_effects_are_statsmodels(case):
    "Main effects of unbalanced designs with runs missing"
    names = "abc"[:len(case["sizes"])]
    rows = [dict(zip(names, map(str, place))) | dict(run=str(n), seed=seed, state="FAILED" if n in case["lost"] else "DONE", y=y)
            for n, (place, seed, y) in enumerate(zip(case["rows"], case["seeds"], case["y"]))]
    design = design_of(rows, names)
    y, there = results_of(rows, "y")
    for e in case["effects"]:
        arms = [{names[e["axis"]]: str(level)} for level in (e["level"], 0)]
        told = effect(design, (y, there), *arms)
        ours = told.beside   # the noise of runs
        assert told.whole and ours.degrees == case["degrees"]
        assert np.allclose([ours.mean, ours.error, ours.p, ours.low, ours.high], [e[k] for k in ("mean", "error", "p", "low", "high")], rtol=1e-8)


def test_seed_noise_is_the_paired_test_where_nothing_is_missing():
    rng = np.random.default_rng(0)
    for sizes, count in (((2, 3), 4), ((2, 2, 2), 2), ((4,), 3)):
        places = list(itertools.product(*map(range, sizes)))
        rows = [dict(zip("abc", map(str, p))) | dict(run="", seed=s, state="DONE", y=rng.standard_normal() + s) for s in range(count) for p in places]
        found = effect(design_of(rows, "abc"[:len(sizes)]), results_of(rows, "y"), {"a": "1"}, {"a": "0"}).found
        means = [[np.mean([r["y"] for r in rows if r["seed"] == s and r["a"] == level]) for s in range(count)] for level in "10"]
        theirs = stats.ttest_rel(*means)
        assert np.allclose([found.p, found.low, found.high, found.degrees], [theirs.pvalue, *theirs.confidence_interval(), count - 1])


def test_blocks_hold_every_level_once():
    for sizes in ((2, 2, 2), (3, 3), (4,)):
        places = list(itertools.product(*map(range, sizes)))
        blocks = balanced_blocks(places, sizes[0])
        for block in {*blocks}:
            own = [p for p, b in zip(places, blocks) if b == block]
            assert all(sorted(p[axis] for p in own) == list(range(sizes[0])) for axis in range(len(sizes)))


def test_power_is_what_simulated_t_tests_find():
    rng = np.random.default_rng(1)
    d = rng.normal(0.02, 0.012, (20_000, 5))
    found = (stats.ttest_1samp(d, 0, axis=1).pvalue < 0.05) & (d.mean(1) > 0)
    assert abs(found.mean() - chance_to_find(0.02, 0.012/np.sqrt(5), 4)) < 0.01
    assert np.isclose(chance_to_find(smallest_found(0.5, 7, 0.01, 0.9), 0.5, 7, 0.01), 0.9, atol=1e-3)


def test_power_is_that_of_the_noncentral_t():
    "Against scipy.stats, which takes half a second to import, before every plan: nothing that a plan needs may bring it in"
    for degrees, alpha, wanted in itertools.product((1, 1.3, 2, 3.7, 10, 200), (.05, .05/3, .05/200), (.5, .8, .9)):
        bound = stats.t.isf(alpha/2, degrees)
        for effect in (0, .5, 2, 4, 10): assert np.isclose(chance_to_find(effect, .7, degrees, alpha), stats.nct.sf(bound, degrees, effect/.7), atol=1e-8)
        least = smallest_found(.7, degrees, alpha, wanted)/.7
        if least < 1000: assert np.isclose(stats.nct.sf(bound, degrees, least), wanted, atol=1e-4)   # beyond, scipy's own series does not converge
    code = "import sys, peer_nb.running.command; from peer_nb.factorial import smallest_found; smallest_found(1, 2); print('scipy.stats' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def crossed(rng, studies, seeds, items, ratio, rest, heavy=False):
    "Studies whose truth is 0 [studies, seeds, items]; ratio: what seeds do to the mean, in what items do to it (variances); and that error"
    def draw(*shape): return rng.standard_t(3, shape)/3**.5 if heavy else rng.standard_normal(shape)
    mood = (ratio*seeds/items)**.5
    return mood*draw(studies, seeds, 1) + draw(studies, 1, items) + rest*draw(studies, seeds, items), (mood**2/seeds + 1/items + rest**2/seeds/items)**.5


def over_both(d): return added_noise(compare(d.mean(1)), compare(d.mean(0)))


def test_two_sources_are_those_of_a_mixed_model():
    "Against statsmodels 0.15's MixedLM (REML, crossed): a standard error of 0.348707; the sum counts the noise of single answers twice, and without one of them it is the same"
    rng = np.random.default_rng(5)
    d = 0.3 + rng.normal(0, .6, (5, 1)) + rng.normal(0, 1, (1, 30)) + rng.normal(0, 1, (5, 30))
    rest = d - d.mean(1, keepdims=True) - d.mean(0, keepdims=True) + d.mean()
    once = (rest**2).sum()/(4*29)/(5*30)
    both = np.hypot(compare(d.mean(1)).error, compare(d.mean(0)).error)
    assert abs((both**2 - once)**.5 - 0.348707) < 1e-5 and 0.348707 < both < 0.36


def test_an_answer_over_both_is_never_surer_than_over_one():
    "Interval and p, where seeds, items or both move the mean; at 5 % they say the same"
    rng = np.random.default_rng(6)
    for ratio in (0, .1, 1, 10):
        for d in crossed(rng, 50, 2, 20, ratio, .5)[0]:
            a, b, both = compare(d.mean(1)), compare(d.mean(0)), over_both(d)
            assert both.low <= min(a.low, b.low) + 1e-12 and both.high >= max(a.high, b.high) - 1e-12 and both.p >= max(a.p, b.p) - 1e-12
            assert (both.p < .05) == (not both.low <= 0 <= both.high)


def coverage(rng, studies, *world):
    "Shares of studies whose interval holds the truth, and that say SUPPORTED of nothing"
    found = [over_both(d) for d in crossed(rng, studies, *world)[0]]
    return np.mean([c.low <= 0 <= c.high for c in found]), np.mean([c.low > 0 for c in found])


@pytest.mark.parametrize("seeds, ratio", [(2, 10), (3, 1), (5, 3)])
def test_crossed_seeds_and_items_cover_what_they_promise(seeds, ratio):
    "2,000 studies on 50 documents, both drawn anew in each; at 2 seeds a joined error alone would hold the truth in 87 %"
    held, false = coverage(np.random.default_rng([seeds, ratio]), 2000, seeds, 50, ratio, .5)
    assert held >= .93 and false <= .05


@pytest.mark.slow
@pytest.mark.parametrize("seeds, items", [(2, 20), (2, 100), (3, 20), (3, 100), (5, 50)])
def test_the_grid_of_crossed_seeds_and_items(seeds, items):
    "4,000 studies a world: which noise is larger, how large that of single answers is, and heavy tails"
    worlds = [(ratio, rest, heavy) for ratio in (0, .1, .3, 1, 3, 10, 100) for rest in (0, .5, 3) for heavy in (False, True) if ratio or rest]
    found = {world: coverage(np.random.default_rng([seeds, items, n]), 4000, seeds, items, *world) for n, world in enumerate(worlds)}
    assert min(held for held, _ in found.values()) >= .93 and max(false for _, false in found.values()) <= .05, found


def test_precision_needs_no_run():
    places = list(itertools.product((0, 1), (0, 1)))*3
    columns = factor_columns(places, (2, 2))
    contrast = np.array([[0.0, 1, 0, .5]])
    seeds = np.repeat([1, 2, 3], 4)
    (error, degrees), = precision(weights(columns, contrast, seeds))
    assert np.isclose(error, np.sqrt(4/12)) and np.isclose(degrees, 2)
