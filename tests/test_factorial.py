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
from peer_nb.stats import added_noise, from_error

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


def test_crossed_seeds_and_items_cover_what_they_promise():
    "Differences of 3 seeds on 12 documents, both drawn anew in every study: 95 % intervals hold the truth at least as often"
    rng, held, narrow = np.random.default_rng(2), 0, 0
    for _ in range(1500):
        d = 0.3 + rng.normal(0, 1, (3, 1)) + rng.normal(0, 1.5, (1, 12)) + rng.normal(0, 1, (3, 12))
        by_seed, by_item = d.mean(1), d.mean(0)
        seeds = from_error(d.mean(), by_seed.std(ddof=1)/3**.5, 2, 3)
        both = added_noise(seeds, from_error(d.mean(), by_item.std(ddof=1)/12**.5, 11, 12))
        held, narrow = held + (both.low <= 0.3 <= both.high), narrow + (seeds.low <= 0.3 <= seeds.high)
    assert held/1500 > 0.935 and narrow < held


def test_precision_needs_no_run():
    places = list(itertools.product((0, 1), (0, 1)))*3
    columns = factor_columns(places, (2, 2))
    contrast = np.array([[0.0, 1, 0, .5]])
    seeds = np.repeat([1, 2, 3], 4)
    (error, degrees), = precision(weights(columns, contrast, seeds))
    assert np.isclose(error, np.sqrt(4/12)) and np.isclose(degrees, 2)
