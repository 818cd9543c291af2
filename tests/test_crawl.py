"Every page of the site in a browser: on a desk, on a phone, in the dark. Nothing stands out sideways, no picture is missing, the console is silent."
import subprocess
from pathlib import Path

import pytest
import site_check as site

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not site.browser(), reason="needs Chromium or Chrome")]
PAGES = [str(p.relative_to(site.ROOT/"nbs")) for p in site.pages()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    from plotly.offline import get_plotlyjs
    place = tmp_path_factory.mktemp("crawl")
    (place/"plotly.min.js").write_text(get_plotlyjs())
    return place


@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_a_browser(name, place):
    file = place/(name.replace("/", "-") + ".html")
    file.write_text(site.standing(site.ROOT/"nbs"/name, place/"plotly.min.js"))
    for width, dark in ((1280, False), (390, False), (390, True)):
        seen, console = site.looked_at(file, width, dark)
        where = f"{width} px{' in the dark' if dark else ''}"
        assert seen, f"{where}: the page was not drawn"
        assert seen["width"] <= max(seen["seen"], 1) + 1, f"{where}: scrolls sideways, {seen}"
        assert not seen["wide"], f"{where}: {seen['wide']} stand out"
        assert not seen["dead"], f"{where}: pictures that are not there: {seen['dead']}"
        assert not console, f"{where}: {console}"


def test_what_stands_out_is_seen(place):
    file = place/"wide.html"
    file.write_text(f"<!doctype html><meta name=viewport content=width=device-width>{site.LOOK}<main><p style='width:900px'>x</p><img src=gone.png><script>console.error('no')</script></main>")
    seen, console = site.looked_at(file, 500)
    assert seen["width"] > 500 and seen["wide"] and seen["dead"] == ["gone.png"] and console
