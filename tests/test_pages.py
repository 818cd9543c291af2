"Pages read well: prose before code, definitions in small cells, and most of what a reader sees shows something."
import json
import re
import statistics
from pathlib import Path

import house
import pytest

EXPORT = re.compile(r"^\s*#\s*\|\s*exports?\b", re.M)
UNSEEN = re.compile(r"^\s*#\s*\|\s*(hide|default_exp|code-fold|echo:\s*false)", re.M)
SHOWS_LESS = {   # page: why fewer than a third of its visible cells end in something shown
    "experiments/bridge.ipynb": "trains a translator and asks twelve arms: more minutes than the pages of a site have",
    "experiments/bridge_inference.ipynb": "asks a run that a study has made; there is none where pages are stored",
}
LONGER = {"models/08_causal_lm.ipynb": 45}   # the decoder's __init__ and forward stand together
PAGES = sorted(str(p.relative_to(house.ROOT/"nbs")) for p in (house.ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


class Page:
    "A notebook as its reader meets it"
    def __init__(self, path: Path):
        self.cells = json.loads(path.read_text())["cells"]
        code = [c for c in self.cells if c["cell_type"] == "code"]
        self.exported = ["".join(c["source"]) for c in code if EXPORT.search("".join(c["source"]))]
        self.visible = [c for c in code if "".join(c["source"]).strip() and not EXPORT.search("".join(c["source"])) and not UNSEEN.search("".join(c["source"]))]
        self.showing = sum(bool(c["outputs"]) for c in self.visible)

    def lengths(self) -> list[int]:
        "Lines of code of each exported cell, comments and blanks apart"
        return [sum(bool(l.strip()) and not l.lstrip().startswith("#") for l in s.splitlines()) for s in self.exported]

    def first(self, wanted) -> int:
        "Place of the first cell that a function takes"
        return next((n for n, c in enumerate(self.cells) if wanted(c["cell_type"], "".join(c["source"]))), len(self.cells))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_reads_well(name):
    page = Page(house.ROOT/"nbs"/name)
    lengths = page.lengths()
    wide = [l for s in page.exported for l in s.splitlines() if len(l) > 120]
    assert not wide, f"{len(wide)} exported lines over 120 characters: {wide[0]}"
    assert max(lengths, default=0) <= LONGER.get(name, 40), f"an exported cell of {max(lengths)} lines"
    median = statistics.median(lengths) if len(lengths) > 2 else 0
    assert median <= 12, f"median exported cell of {median} lines"
    prose = page.first(lambda kind, s: kind == "markdown" and any(l.strip() and l[0] not in "#>" for l in s.splitlines()))
    wall = page.first(lambda kind, s: kind == "code" and len(s.splitlines()) > 6 and not UNSEEN.search(s))
    assert prose <= wall, "opens with code before its first prose"
    promise = page.first(lambda kind, s: kind == "markdown" and re.search(r"^# .+\n+> \S", s))
    assert promise <= 1, "the first cell that is read must be a title and a promise: # Title, > what the page gives"
    share = page.showing/len(page.visible) if len(page.visible) > 3 else 1
    assert share >= 1/3 or name in SHOWS_LESS, f"{page.showing} of {len(page.visible)} visible cells show something"
    assert share < 1/3 or name not in SHOWS_LESS, "shows enough by now: take it off SHOWS_LESS"


def test_half_of_all_visible_cells_show_something():
    pages = [Page(house.ROOT/"nbs"/name) for name in PAGES]
    shown, seen = sum(p.showing for p in pages), sum(len(p.visible) for p in pages)
    assert shown >= seen/2, f"{shown} of {seen}"


def test_a_wall_of_code_is_seen(tmp_path):
    cell = lambda kind, s: dict(cell_type=kind, source=[s], **({"outputs": []} if kind == "code" else {}))
    path = tmp_path/"page.ipynb"
    path.write_text(json.dumps(dict(cells=[cell("code", "#| default_exp a"), cell("code", "#| export\n" + "x = 1\n"*41), cell("code", "1 + 1"), cell("code", "#| hide\n2")])))
    page = Page(path)
    assert (page.lengths(), len(page.visible), page.showing) == ([41], 1, 0)
