"Each page of the site converts and each internal link resolves, with no Quarto on the machine."
import json
import re
import subprocess
from pathlib import Path

import house
import pytest
import site_check as site
import yaml


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return site.processed(tmp_path_factory.mktemp("site"))


def test_sidebar_lists_every_page_once():
    listed = site.sidebar()
    assert len(listed) == len(set(listed))
    results = {name for name in listed if name.endswith(".html")}
    assert set(listed) - results == {str(p.relative_to(site.ROOT/"nbs")) for p in site.pages()}
    assert not [name for name in results if not (site.ROOT/"nbs"/name).is_file()]


def test_finished_studies_are_whole():
    "Pages of results, and the report of a run of each study; nothing that they link to or load is missing but plotly, which make docs copies to one place"
    for page in [*site.ROOT.glob("nbs/example/**/*.html"), *site.ROOT.glob("nbs/results/**/*.html")]:
        wanted = re.findall(r'(?:href|src)="([^"#]+)', page.read_text())
        missing = [w for w in wanted if not re.match("https?:|data:|mailto:", w) and not (page.parent/w).exists()]
        assert {(page.parent/w).resolve() for w in missing} <= {site.ROOT/"nbs"/"example"/"plotly.min.js"}, f"{page} links to {missing}"
    studies = [runs.parent for runs in site.ROOT.glob("nbs/*/**/runs")]
    assert site.ROOT/"nbs"/"example" in studies and all(len(list(study.glob("runs/*/report.html"))) == 1 for study in studies)
    resources = yaml.safe_load((site.ROOT/"_quarto.yml").read_text())["project"]["resources"]
    assert {study.relative_to(site.ROOT/"nbs").parts[0] for study in studies} <= {*resources}


def test_quarto_finds_its_configuration():
    assert (site.ROOT/"nbs"/"_quarto.yml").resolve() == site.ROOT/"_quarto.yml"


def test_every_page_has_a_title_and_no_traceback(built):
    for page in site.pages(built):
        assert site.front_matter(page).get("title"), f"{page.name} has no title"
        assert "Traceback (most recent call last)" not in site.outputs(page), f"{page.name} shows a traceback"


def test_pages_convert(built):
    "Some of each kind; tests/test_crawl.py looks at all of them"
    for name in ("index", "start/00_quickstart", "reference/00_keys", "models/01_mla", "experiments/train_and_evaluate"):
        assert "<h2" in site.to_html(built/f"{name}.ipynb"), name


def test_internal_links_resolve(built):
    broken = site.broken_links(built, site.site_address())
    assert not broken, "links that lead nowhere:\n" + "\n".join(broken)


def test_a_broken_link_is_found(tmp_path):
    cell = dict(cell_type="markdown", metadata={}, source="# A\n[gone](b.ipynb) [here](a.ipynb#a) [no heading](a.ipynb#z)")
    (tmp_path/"a.ipynb").write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    assert site.broken_links(tmp_path, "https://nowhere") == ["a.ipynb: b.ipynb", "a.ipynb: a.ipynb#z (no such heading)"]


def test_every_public_symbol_is_documented(built):
    "The page of a module shows each public function and class with its signature"
    for page in site.pages(built):
        shown = site.outputs(page)
        missing = [name for name in site.public_symbols(site.ROOT/"nbs"/page.relative_to(built)) if not re.search(rf"### {name}\b", shown)]
        assert not missing, f"{page.name} does not document {missing}"


def test_what_fields_mean_is_on_the_page(built):
    "The comments beside the fields of public dataclasses, as they are rendered; signatures carry no links; links to our own pages are relative"
    import importlib
    from dataclasses import is_dataclass
    from peer_nb.documented import comments_of, table_cell
    address, said = site.site_address(), 0
    for page in site.pages(built):
        notebook, shown = site.ROOT/"nbs"/page.relative_to(built), site.outputs(page)
        assert not re.search(r"^    \w+:.*# .*\]\(", shown, re.M), f"{page.name}: a link inside a signature"
        assert f"]({address}" not in shown + site.markdown(page), f"{page.name}: a link to our own site that names its address"
        if not (module := house.exported(notebook)[0]): continue
        own = importlib.import_module(f"peer_nb.{module}")
        for name, kind in [*vars(own).items()]:
            if name.startswith("_") or not isinstance(kind, type) or kind.__module__ != own.__name__ or not is_dataclass(kind): continue
            if any(base.__module__.startswith("transformers.") for base in kind.__mro__): continue   # its keys are those of a section, shown there
            lost = [text for text in comments_of(kind).values() if table_cell(text).split("`")[0] not in shown]
            assert not lost, f"{page.name}: {name} says nowhere {lost}"
            said += len(comments_of(kind))
    assert said > 500


def test_a_notebook_that_is_saved_without_an_edit_stays_the_same():
    "What Jupyter writes, by the hook that CONTRIBUTING installs, is what lies there"
    import nbformat
    from nbdev.clean import clean_jupyter
    for page in site.pages():
        book = nbformat.read(page, as_version=4)
        book.metadata["language_info"] = {"name": "python", "version": "3"}
        model = dict(type="notebook", content=book)
        clean_jupyter(str(page), model)
        assert nbformat.writes(nbformat.from_dict(model["content"])).rstrip("\n") == page.read_text().rstrip("\n"), f"{page.name} would be another file"


def test_the_page_of_commands_says_what_the_commands_say(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    from contextlib import redirect_stdout
    import importlib.metadata
    import io
    page = site.outputs(site.ROOT/"nbs"/"reference"/"01_commands.ipynb")
    for entry in importlib.metadata.entry_points(group="console_scripts"):
        if not entry.value.startswith("peer_nb."): continue
        with redirect_stdout(io.StringIO()) as out: entry.load()(["--help"])
        assert out.getvalue().strip() in page, f"{entry.name}: run make pages"


def test_readme_is_the_index_page(built):
    assert (site.ROOT/"README.md").read_text() == site.readme(built/"index.ipynb"), "run make readme"


def test_readme_pictures_exist():
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (site.ROOT/"README.md").read_text()): assert (site.ROOT/target).exists(), target


def test_outputs_are_small_and_say_nothing_of_a_machine():
    for page in site.pages():
        outputs = json.dumps([c.get("outputs", []) for c in json.loads(page.read_text())["cells"]])
        assert len(outputs) < 200_000, f"{page.name} stores {len(outputs)//1000} kB of outputs"
        assert not re.search(r"(?<![\w.}])/(home|root|tmp|work|Users)/\w", outputs), f"{page.name} shows a path of the machine it ran on"


def test_make_docs_names_what_is_missing(tmp_path):
    "Without Quarto make docs says what to install and changes nothing"
    stub = tmp_path/".venv"
    stub.mkdir()
    for name in ("Makefile", "constraints.txt", "settings.ini", "setup.py"): (tmp_path/name).write_bytes((site.ROOT/name).read_bytes())
    for name in ("bin/python", "torch", "base", "dev"):
        (stub/name).parent.mkdir(exist_ok=True); (stub/name).touch()
    done = subprocess.run(["make", "docs"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2 and "quarto.org/docs/get-started" in done.stdout


def test_cells_with_imports_hold_nothing_else():
    "nbdev runs every cell that imports when it builds the site, and none of the cells before it"
    mixed = [f"{page.name}: {''.join(cell['source']).splitlines()[0]}" for page in site.pages() for cell in json.loads(page.read_text())["cells"]
             if cell["cell_type"] == "code" and site.mixes_imports("".join(cell["source"]))]
    assert not mixed, "put the imports into a cell of their own:\n" + "\n".join(mixed)


def test_every_configuration_is_explained_where_it_lies():
    for readme in (site.ROOT/"configs").rglob("README.md"):
        text = readme.read_text()
        for file in readme.parent.rglob("*.yaml"):
            nearer = file.parent/"README.md"
            if nearer.exists() and nearer != readme: continue
            if any((parent/"README.md").exists() for parent in file.parents if readme.parent in parent.parents): continue
            assert f"`{file.relative_to(readme.parent)}`" in text, f"{readme.relative_to(site.ROOT)} does not name {file.name}"
        for link in re.findall(r"\]\(([^)#]+)", text): assert (readme.parent/link).exists(), f"{readme.relative_to(site.ROOT)}: {link}"
