"""The docs site without Quarto: run the notebooks, write README.md, find what would break when the site is built.

    python tests/site_check.py run [NOTEBOOK …]    run notebooks, or every one, and store their outputs
    python tests/site_check.py readme   write README.md from nbs/index.ipynb
    python tests/site_check.py example STUDY [TO]    publish a finished study: its page, and the report of its best run; TO: a folder in nbs, else example
    python tests/site_check.py result PAGE TO    publish one page that a command has written, such as peer-bridge tables, as TO/index.html
"""
import ast
import configparser
import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from base64 import b64decode, b64encode
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import yaml

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|(?:href|src)=\"([^\"]+)\"")


def pages(folder: Path = ROOT/"nbs") -> list[Path]:
    "The notebooks of the site"
    return sorted(p for p in folder.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts))


def sidebar(quarto: Path = ROOT/"_quarto.yml") -> list[str]:
    "The pages in reading order"
    def walk(items):
        for item in items:
            if isinstance(item, str): yield item
            else: yield from walk(item.get("contents", [])) if "contents" in item else [item["href"]]
    return list(walk(yaml.safe_load(quarto.read_text())["website"]["sidebar"]["contents"]))


def processed(folder: Path) -> Path:
    "What nbdev hands to Quarto, made in a copy of the project"
    shutil.copytree(ROOT/"nbs", folder/"nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*"))
    shutil.copytree(ROOT/"peer_nb", folder/"peer_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT/name, folder)
    (folder/"nbs"/"_quarto.yml").symlink_to("../_quarto.yml")
    # at the interpreter's end each of two hundred shells would collect garbage: two minutes for nothing
    script = "import os; from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"nbdev could not process the notebooks:\n{done.stderr}")
    return folder/"_proc"


def markdown(page: Path) -> str:
    "All markdown of a processed page, outputs included"
    cells = json.loads(page.read_text())["cells"]
    text = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    for cell in cells:
        for out in cell.get("outputs", []):
            text.append("".join(out.get("data", {}).get("text/markdown", "")))
    return re.sub(r"```.*?```", "", "\n\n".join(text), flags=re.S)


def outputs(page: Path) -> str:
    "What the cells of a page show, as markdown or text"
    shown = [o.get("data", {}) for c in json.loads(page.read_text())["cells"] for o in c.get("outputs", [])]
    return "\n".join("".join(data.get("text/markdown") or data.get("text/plain") or "") for data in shown)


def front_matter(page: Path) -> dict:
    "Title and description, as nbdev puts them into the first cell"
    first = "".join(json.loads(page.read_text())["cells"][0]["source"])
    return yaml.safe_load(first.strip().strip("-")) if first.startswith("---") else {}


def public_symbols(notebook: Path) -> list[str]:
    "Functions and classes that a notebook exports and that nbdev documents"
    cells = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    exported = [c for c in cells if re.search(r"^#\|\s*exports?\b", c, re.M) and "#| hide" not in c]
    quiet = set(re.findall(r"show_doc\((\w+)\)", "\n".join(cells)))
    nodes = [node for c in exported for node in ast.parse(c).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [n.name for n in nodes if not n.name.startswith("_") and not n.decorator_list and n.name not in quiet]


def slug(heading: str) -> str:
    "Quarto's anchor of a heading"
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", lambda m: m[1] or "", heading)
    return re.sub(r"-+", "-", re.sub(r"[^\w\- .]", "", plain.lower()).strip().replace(" ", "-")).lstrip("0123456789-_.")


def anchors(page: Path) -> set[str]:
    "What a link can point at within a page: headings and documented symbols"
    text = markdown(page)
    return {slug(h) for h in re.findall(r"^#{1,6}\s+(.+?)\s*$", text, re.M)} | set(re.findall(r'id="([^"]+)"', text)) | set(re.findall(r"\{#([\w.-]+)", text)) | \
        {h.strip() for h in re.findall(r"^#{1,6}\s+(\S+)\s*$", text, re.M)}


def broken_links(site: Path, base_url: str) -> list[str]:
    "Internal links of the processed site that lead nowhere; base_url is where the site will be published"
    found = []
    for page in pages(site):
        for match in LINK.finditer(markdown(page)):
            link = unquote(match[1] or match[2])
            if link.startswith(base_url): target, root = link.removeprefix(base_url).lstrip("/"), site
            elif re.match(r"[a-z][a-z0-9+.-]*:", link): continue
            else: target, root = link, page.parent
            path, _, anchor = target.partition("#")
            file = (root/path) if path else page
            if file.suffix == ".html" and not file.exists(): file = source_of(file)
            if file is None or not file.exists(): found.append(f"{page.relative_to(site)}: {link}")
            elif anchor and file.suffix == ".ipynb" and not ({anchor, anchor.lower()} & anchors(file)):
                found.append(f"{page.relative_to(site)}: {link} (no such heading)")
    return found


def source_of(html: Path) -> Path | None:
    "The notebook that a page is made from: nbdev drops the number from the page's name"
    return next((p for p in html.parent.glob("*.ipynb") if re.sub(r"^\d+[a-z]?_", "", p.stem) == html.stem), None)


def published(text: str, name: str, to: Path, here: set[str], study: Path) -> str:
    "A page of results as one of the site: no folder of this machine, one copy of plotly.js, links to what stays behind become text"
    text = re.sub(rf"(?<![\w.])/[\w./-]*/{re.escape(study.name)}\b", f"{study.parent.name}/{study.name}", text)
    script = os.path.relpath(ROOT/"nbs"/"example"/"plotly.min.js", (to/name).parent)
    text = re.sub(r'(<script[^>]*src=")[./]*plotly\.min\.js', rf"\g<1>{script}", text)
    gone = lambda m: m[0] if m[1].startswith(("http", "#")) or m[1].partition("#")[0] in here else m[2]
    return re.sub(r'<a [^>]*?href="([^"]*)"[^>]*>(.*?)</a>', gone, text, flags=re.S)


def publish(study: Path, to: Path = ROOT/"nbs"/"example"):
    "A study's page and the report of its best run, as pages of the site"
    from peer_nb.study.run import file_name
    plan = json.loads((study/"plan.json").read_text())["plan"]
    with open(study/"ablation_results.csv", newline="") as file: rows = [row for row in csv.DictReader(file) if row[plan["metric"]]]
    kept = (min if plan["direction"] == "minimize" else max)(rows, key=lambda row: float(row[plan["metric"]]))["run"]
    shutil.rmtree(to, ignore_errors=True)
    for name in ("index.html", f"runs/{kept}/report.html"):
        (to/name).parent.mkdir(parents=True, exist_ok=True)
        (to/name).write_text(published((study/name).read_text(), name, to, {"../../index.html", f"runs/{kept}/report.html"}, study))
    if to == ROOT/"nbs"/"example": shutil.copy(study/"visualizations"/f"intervals-{file_name(plan['metric'])}.svg", to/"effects.svg")   # on the front page


def publish_page(page: Path, to: Path):
    "One page that a command has written"
    to.mkdir(parents=True, exist_ok=True)
    (to/"index.html").write_text(published(page.read_text(), "index.html", to, set(), page.resolve().parent))


def mixes_imports(cell: str) -> bool:
    "Whether a cell that is not exported imports and does something else as well"
    if cell.startswith("%%") or re.search(r"^\s*#\|\s*(export|exec_doc|eval:\s*false)", cell, re.M): return False
    nodes = list(ast.walk(ast.parse(cell)))
    return any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes) and any(isinstance(n, (ast.Expr, ast.Assign)) for n in nodes)


@cache
def exporter():
    from nbconvert import HTMLExporter
    return HTMLExporter(exclude_raw=True, exclude_input=True)


def to_html(page: Path) -> str:
    "Prose and outputs of a page as nbconvert draws them"
    import nbformat
    notebook = json.loads(page.read_text())
    for cell in notebook["cells"]: cell.pop("has_sd", None)   # nbdev's own mark on the cells it adds
    return exporter().from_notebook_node(nbformat.reads(json.dumps(notebook), as_version=4))[0]


def site_address() -> str:
    "Where the site is published"
    settings = configparser.ConfigParser()
    settings.read(ROOT/"settings.ini")
    return settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]


def readme(index: Path) -> str:
    "README.md from the processed index page: pictures and pages are found from the top of the repository"
    cells, matter = json.loads(index.read_text())["cells"], front_matter(index)
    parts = [f"# {matter['title']}", f"> {matter['description']}"]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown": parts.append(source)
        elif cell["cell_type"] == "code":
            code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
            if code.strip(): parts.append(f"```python\n{code.strip()}\n```")
            for out in cell.get("outputs", []):
                data = out.get("data", {})
                shown = "".join(data.get("text/markdown") or out.get("text") or data.get("text/plain") or "").rstrip()
                if shown: parts.append(shown if "text/markdown" in data else "\n".join("    " + line for line in shown.splitlines()))
    text = "\n\n".join(p.strip("\n") for p in parts) + "\n"
    text = text.replace("\n```\n\n```python\n", "\n\n")   # neighbouring cells read as one block
    text = re.sub(r"(\[[^\]]*\]\([^)]*\))\{\.btn[^}]*\}", r"**\1**", text)   # buttons of the site
    text = re.sub(r"\]\((example/[^)]*\.html)", rf"]({site_address()}/\1", text)   # a page that GitHub would show as source
    return re.sub(r"(\]\(|src=\")(?!https?:|#|nbs/|\.\./)([\w./-]+\.(?:png|svg|ipynb))", r"\1nbs/\2", text)


def run(page: Path):
    "Run one notebook and keep its outputs, but for what libraries say on stderr"
    script = ("import sys, os; os.environ['IN_TEST'] = '1'\nfrom execnb.shell import CaptureShell\nfrom execnb.nbio import read_nb, write_nb\n"
              "nb = read_nb(sys.argv[1]); shell, cells = CaptureShell('.'), nb.cells\n"
              "nb.cells = [c for c in cells if '| eval: false' not in c.source]; shell.run_all(nb, exc_stop=True); nb.cells = cells\n"
              "if shell.exc: sys.exit(shell.prettytb(sys.argv[1]))\n"
              "for cell in nb.cells:\n"
              "    if cell.cell_type == 'code': cell.outputs = [o for o in cell.get('outputs', []) if o.get('name') != 'stderr']\n"
              "write_nb(nb, sys.argv[1])")
    done = subprocess.run([sys.executable, "-c", script, page.name], cwd=page.parent, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{page.relative_to(ROOT)} failed:\n{done.stderr}")
    lighten(page)


def lighten(page: Path):
    "Outputs as the site wants them: plotly's figures by the one copy of plotly.js that the site has, no long plain twins of tables"
    from plotly.io import from_json, to_html
    script = os.path.relpath(ROOT/"nbs"/"example"/"plotly.min.js", page.parent)
    notebook, figures = json.loads(page.read_text()), 0
    for cell in notebook["cells"]:
        kept = []
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if len("".join(data.get("text/html", ""))) > 1_000_000: continue   # plotly.js itself, put before the first figure
            if found := data.get("application/vnd.plotly.v1+json"):
                figure = from_json(json.dumps({k: found[k] for k in ("data", "layout") if k in found}))
                drawn = to_html(figure, include_plotlyjs=script, full_html=False, div_id=f"figure-{(figures := figures + 1)}")
                data["text/html"] = drawn.splitlines(True)   # as Jupyter writes it
            if "text/markdown" in data: data.pop("text/plain", None)   # long, and may name folders
            if "image/png" in data: data["image/png"] = few_colours("".join(data["image/png"]))
            kept.append(out)
        if "outputs" in cell: cell["outputs"] = kept
    page.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def few_colours(png: str) -> str:
    "A picture in base64 with a palette, where that is smaller"
    from PIL import Image
    Image.open(io.BytesIO(b64decode(png))).convert("RGB").quantize(64).save(small := io.BytesIO(), "PNG", optimize=True)
    return min(png, b64encode(small.getvalue()).decode() + "\n", key=len)


def browser() -> str | None:
    "A Chromium of this machine"
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


LOOK = """<script>addEventListener("load", () => setTimeout(() => {
  const wide = [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest("pre, table, .plotly-graph-div, .math, div[style*=overflow]"))
  document.title = JSON.stringify({width: document.documentElement.scrollWidth, seen: innerWidth, wide: wide.slice(0, 3).map(e => e.outerHTML.slice(0, 80)),
    dead: [...document.images].filter(i => !i.naturalWidth).map(i => i.getAttribute("src"))})
}, 300))</script>"""


def standing(page: Path, plotly: Path) -> str:
    "A page by itself: what nbconvert draws, in the site's own styles"
    body = re.sub(r"<script[^>]*plotly\.min\.js[^>]*></script>", f'<script src="{plotly.as_uri()}"></script>', to_html(page))
    style = (ROOT/"nbs"/"styles.css").read_text()
    frame = "body { margin: 0; font: 17px/1.5 sans-serif; } main { max-width: 860px; margin: auto; padding: 0 12px; } pre { white-space: pre-wrap; }"
    return f'<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><base href="{page.parent.as_uri()}/">' \
        f"<style>{frame}{style}</style>{LOOK}<main>{body}</main>"


def looked_at(file: Path, width: int, dark: bool = False) -> tuple[dict, list[str]]:
    "What a browser sees of a page: its width, what stands out of it, pictures that are not there; and what its console says"
    with tempfile.TemporaryDirectory() as profile:
        words = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--user-data-dir={profile}", "--enable-logging=stderr",
                 f"--window-size={width},900", *(["--blink-settings=preferredColorScheme=0"] if dark else []), "--virtual-time-budget=4000", "--dump-dom", file.as_uri()]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout, re.S)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(found[1])) if found else {}, console


def main(what: str = "", *more: str):
    if what == "run":
        for page in [Path(name).resolve() for name in more] or pages():
            print(page.relative_to(ROOT), flush=True)
            run(page)
    elif what == "example": publish(Path(more[0]), ROOT/"nbs"/(more[1] if more[1:] else "example"))
    elif what == "result": publish_page(Path(more[0]), ROOT/"nbs"/more[1])
    elif what == "readme":
        with tempfile.TemporaryDirectory() as folder: (ROOT/"README.md").write_text(readme(processed(Path(folder))/"index.ipynb"))
    else: sys.exit(__doc__)


if __name__ == "__main__": main(*sys.argv[1:])
