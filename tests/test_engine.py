"A run is one process: its outputs are a kernel's, its numbers a plain notebook's, and what lies about on the machine stays outside."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from torch.utils._pytree import tree_leaves

import peer_nb
from fake_studies import TEMPLATE, ended, fake_study, launch, until
from test_ablation import BASE, COMMAND, STUDY, write_study
from peer_nb.children import start_child
from peer_nb.config import load_config
from peer_nb.files import read_json, write_json
from peer_nb.study.run import Run
from peer_nb.running.local import environment
from peer_nb.running.wrapper import start_run
from peer_nb.study.plan import load_plan, make_plan, save_plan
from peer_nb.study.study import Budget, Study

PLAIN = """
import json, sys
import papermill
papermill.execute_notebook(*sys.argv[1:3], parameters=json.loads(sys.argv[3]), kernel_name="python3", progress_bar=False)
"""

KINDS = ['a: str = "x"', 'print("one"); print("two")\nimport sys; print("err", file=sys.stderr)\n"result"', "%%capture c\nprint('hid')\n1+1", "c.show()",
         "from IPython.display import HTML, Image, Markdown, clear_output, display\nh = display('first', display_id=True)\nprint('between')\nh.update('second')\ndisplay(HTML('<b>x</b>'), Markdown('*y*'))",
         "print('gone'); clear_output(wait=True); print('kept')", "print('gone'); clear_output(); print('kept')", "x = 1;\nx;", "x", "_, Out[9]", "!echo hi; echo there >&2", "%%bash\necho in bash", "%time 1 + 1",
         "import plotly.graph_objects as go\ngo.Figure(go.Scatter(y=[1, 2]))", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "%matplotlib inline\nplt.plot([2, 1]); plt.show()",
         "import base64\nImage(base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII='))",
         "import asyncio\nawait asyncio.sleep(0.01)\n'awaited'", "from fastprogress.fastprogress import progress_bar\nfor i in progress_bar(range(3)): pass", "import logging; logging.warning('warned')",
         "import pandas as pd\npd.DataFrame(dict(a=[1, 2]))", "import pickle\nclass A: pass\nisinstance(pickle.loads(pickle.dumps(A())), A), __name__", "import os\nif not os.fork(): print('of a child'); os._exit(0)\n_ = os.wait()"]


def notebook(path: Path, cells: list[str]) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    cells[0].metadata.tags = ["parameters"]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def outputs(path: Path) -> list:
    "Of each code cell, streams joined, without what differs from process to process"
    found = []
    for cell in nbformat.read(path, 4).cells:
        joined = []
        for o in cell.get("outputs", []):
            o = dict(o)
            if o["output_type"] == "stream" and joined and joined[-1].get("name") == o["name"]: joined[-1]["text"] += o["text"]; continue
            if o["output_type"] == "error": o["traceback"] = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(o["traceback"]))
            joined.append(o)
        for o in joined:
            if o["output_type"] == "stream": o["text"] = re.sub(r"[\d.]+ [μmn]?s\b", "TIME", o["text"])
            if "data" in o: o["data"] = {k: re.sub(r"[0-9a-f]{12,}|\d+:\d+", "", str(v)) for k, v in o["data"].items()}
        if "outputs" in cell: found.append((cell.execution_count, cell.source, joined))
    return found


HERE = "import json, sys\nfrom peer_nb.running.engine import execute_notebook\nexecute_notebook(*sys.argv[1:3], json.loads(sys.argv[3]))"


def executed(folder: Path, cells: list[str], code: str = HERE) -> list:
    "Outputs of a notebook, executed in one process, or by papermill in a kernel"
    book = notebook(folder/"book.ipynb", cells)
    start_child(code, book, folder/"done.ipynb", json.dumps(dict(a="b")), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder).wait(300)
    return outputs(folder/"done.ipynb")


def test_outputs_are_those_of_a_kernel(tmp_path):
    "Streams, displays that change, magics, figures, pictures, asynchronous cells, forks, errors: type by type what Jupyter's own kernel gives"
    cells = [*KINDS, "def f(): 1/0\nf()", "'never'"]
    here, kernel = (executed(tmp_path, cells, code) for code in (HERE, PLAIN))
    assert len(here) == len(cells) + 1
    for one, other in zip(here, kernel):
        if "os.fork" in one[1]: assert one[2] == []   # what a forked child says is in the log; it must not touch the notebook
        elif "1/0" in one[1]: assert one[:2] == other[:2] and [(o["ename"], o["evalue"]) for o in one[2]] == [(o["ename"], o["evalue"]) for o in other[2]]
        else: assert one == other


@pytest.mark.parametrize("source, name, says", [("1 +", "SyntaxError", "invalid syntax"), ("%no_such_magic", "UsageError", "not found"), ("raise SystemExit(75)", "SystemExit", "75"), ("%%capture\n1/0", "ZeroDivisionError", "by zero"), ("exit", "SystemExit", "0")])
def test_a_notebook_stops_at_the_first_error(source, name, says, tmp_path):
    found = executed(tmp_path, ["a = 1", source, "'never'"])
    (error,) = (o for o in found[2][2] if o["output_type"] == "error")
    assert error["ename"] == name and says in error["evalue"] and found[3][2] == []


def real_study(work: Path) -> tuple[Path, Path]:
    "A planned study with the lab's own notebook; its folder and its first run's"
    base = json.loads(json.dumps(BASE)) | dict(eval_config=dict(max_tokens=500, eval_batch_size=4))
    base["model_config"]["vocab_size"] = 257
    base["train_config"] |= dict(save_steps=5, keep_optimizer_state=True)
    write_study(work, base=base)
    (work/"words.txt").write_text("".join(f"{n} and {n} is {2*n}\n\n" for n in range(600)))
    plan = make_plan(Study("real", str(work/"base.yaml"), {"rate": {"own": {}, "high": {"train_config.learning_rate": 0.02}}}, notebook="train_and_evaluate", budget=Budget(640), seeds=[1]), load_config(work/"base.yaml"))
    (work/"study"/"runs").mkdir(parents=True)
    save_plan(plan, work/"study")
    return work/"study", work/"study"/"runs"/plan.cells[0].id


@pytest.mark.slow
def test_a_run_gives_the_numbers_of_a_plain_notebook(tmp_path):
    "The lab's notebook as a run, and by papermill in a kernel: results, items, samples, weights and optimizer to the bit"
    folder, run = real_study(tmp_path)
    assert start_run(Run(run), environment(1, [])).wait(300) == 0, (run/"log.txt").read_text()
    told = nbformat.read(run/"notebook.ipynb", 4).cells[3].source   # injected by papermill
    given = {}
    exec(told, given)
    given = {k: given[k] for k in ("config_path", "run_dir", "levels", "overrides", "resume")}
    made = Path(shutil.move(run, tmp_path/"made"))
    run.mkdir()
    start_child(PLAIN, load_plan(folder).template, run/"notebook.ipynb", json.dumps(given), environment=environment(1, []), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait(300)
    results = [read_json(p/"result.json") for p in (made, run)]
    for r in results: r["training"] = {k: v for k, v in r["training"].items() if k in ("steps", "tokens", "final_train_loss", "skipped_steps")}
    assert results[0] == results[1]
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.suffix == ".safetensors" or p.name in ("items.jsonl", "samples.jsonl")} for f in (made, run)]
    assert sum(p.suffix == ".safetensors" for p in files[0]) >= 2 and files[0] == files[1]
    states = [torch.load(f/"checkpoint-10"/"trainer_state"/"state.pt", weights_only=True) for f in (made, run)]
    for state in states: del state["counters"]["seconds"]
    leaves, others = [tree_leaves(state) for state in states]
    assert len(leaves) == len(others) and all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(leaves, others))
    page = (made/"report.html").read_text()
    assert "Plotly.newPlot" in page and not re.findall(r'(?:src|href)="https?:', page)


ASKED = ['config_path: str = ""\nrun_dir: str = ""\nlevels: dict = {}\noverrides: dict = {}\nresume: bool = False',
         "import calendar, email, os, queue, random, select, sys\nimport torch\nfrom pathlib import Path\nimport mine\nfrom peer_nb.files import write_json",
         "found = [m.__file__ for m in (calendar, email, queue, random)]\nstrange = [f for f in found if not f.startswith(os.path.dirname(os.__file__))]",
         "write_json(Path(run_dir)/'found.json', dict(strange=strange, dtype=str(torch.get_default_dtype()), mine=mine.value, foreign='elsewhere' in str(sys.path), utf8=sys.flags.utf8_mode))",
         "write_json(Path(run_dir)/'result.json', dict(metrics={'words/bits_per_byte': 1.0}))"]


def test_what_lies_about_on_the_machine_stays_outside(tmp_path):
    "Start-up files of IPython and Python, a kernel of the same name, modules in the working folder and in PYTHONPATH that hide Python's own, another environment, a locale: none reaches a run; a module of one's own does"
    work, mark = fake_study(tmp_path/"study", seeds=[1], axes={"heads": {"four": {}}}), tmp_path/"trapped"
    notebook(work/"template.ipynb", ASKED)
    trap = f"open({str(mark)!r}, 'a').write(__file__ if '__file__' in globals() else 'startup')"
    here, path, startup, kernel = (tmp_path/n for n in ("here", "path", "ipython/profile_default/startup", "jupyter/kernels/python3"))
    for folder in (here, path, startup, kernel): folder.mkdir(parents=True)
    for name in ("calendar", "email", "queue", "random", "select", "statistics"):
        for folder in (here, path): (folder/f"{name}.py").write_text(trap)
    (path/"sitecustomize.py").write_text(f"import sys\nif 'running.wrapper' in str(sys.orig_argv): {trap}")
    for file in (startup/"00-mine.py", tmp_path/"pythonstartup.py"): file.write_text(trap)
    write_json(kernel/"kernel.json", dict(argv=[sys.executable, "-c", trap], display_name="mine", language="python"))
    (here/"mine.py").write_text("value = 'my own'")
    study = "import sys; sys.path[:] = {!r}; sys.argv = ['peer-ablate', *sys.argv[1:]]\nfrom peer_nb.running.command import main; sys.exit(main())".format([p for p in sys.path if p])
    foreign = dict(IPYTHONDIR=str(tmp_path/"ipython"), JUPYTER_PATH=str(tmp_path/"jupyter"), PYTHONSTARTUP=str(tmp_path/"pythonstartup.py"), PYTHONPATH=str(path), VIRTUAL_ENV=str(tmp_path/"elsewhere"),
                   LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", MPLBACKEND="module://of_another_environment", PLOTLY_RENDERER="browser")
    words = ["--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0]
    env = {**os.environ, "PEER_NB_REGISTER": str(tmp_path/"register"), **{k: v for k, v in foreign.items() if k != "MPLBACKEND"}}
    said = subprocess.run([sys.executable, "-P", "-c", study, *map(str, words)], cwd=here, env=env, capture_output=True, text=True)
    run = next((work/"out").glob("*/runs/001*"))
    found = read_json(run/"found.json")
    assert said.returncode == 0, said.stdout + said.stderr + (run/"log.txt").read_text()
    assert found == dict(strange=[], dtype="torch.float32", mine="my own", foreign=False, utf8=1)
    assert not mark.exists(), mark.read_text()


def test_other_code_or_text_than_was_planned_is_not_run(tmp_path):
    "The notebook and the text are edited while the first run is under way: it goes on, the others fail with the reason; put back, they are made"
    work = fake_study(tmp_path)
    text = {p: p.read_text() for p in (work/"words.txt", work/"template.ipynb")}
    process = launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, "--parallel", 1, FAKE_STEP=0.2)
    until(lambda: [*(work/"out").glob("*/runs/001*/heartbeat.json")] or process.poll() is not None)
    (work/"words.txt").write_text("".join(f"{n} or {n} is {2*n}\n\n" for n in range(600)))
    (work/"template.ipynb").write_text(text[work/"template.ipynb"].replace("2*total", "3*total"))
    code, out = ended(process)
    folder, = (work/"out").iterdir()
    runs = [folder/"runs"/c.id for c in load_plan(folder).cells]
    assert code == 1 and [Run(r).state for r in runs] == ["DONE", "FAILED", "FAILED", "FAILED"], out
    said = [read_json(r/"status.json")["error"]["message"] for r in runs[1:]]
    assert all("the template's code changed since the study was planned; text or tokenizer of 1 run changed" in text for text in said)
    for path, before in text.items(): path.write_text(before)
    code, out = ended(launch("--resume", "--retry-failed", "--output-dir", work/"out", FAKE_STEP=0))
    assert code == 0 and "3 of 4 runs to do" in out, out


def own_package(folder: Path) -> tuple[Path, Path]:
    "An environment with a copy of the package that may be edited, and that copy"
    python = folder/"env"/"bin"/"python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder/"env"], check=True)
    site, = (folder/"env").glob("lib/python*/site-packages")
    shutil.copytree(Path(peer_nb.__file__).parent, site/"peer_nb", ignore=shutil.ignore_patterns("__pycache__"))
    libraries = {str(Path(module.__file__).parent.parent) for module in (torch, pytest)}
    (site/"libraries.pth").write_text("".join(f"{place}\n" for place in libraries))
    return python, site/"peer_nb"


def test_a_study_goes_on_after_its_page_has_changed_but_not_its_layers(tmp_path):
    "One byte of the style sheet, then one of a layer, are changed while a study waits; its template imports what the lab's own does"
    python, package = own_package(tmp_path)
    own = nbformat.read(Path(__file__).parent.parent/"nbs"/"experiments"/"train_and_evaluate.ipynb", 4)
    wall = [line for cell in own.cells if cell.cell_type == "code" for line in cell.source.splitlines() if line.startswith("from peer_nb.")]
    assert len(wall) > 10
    work = write_study(tmp_path/"work", {**STUDY, "axes": {"heads": {"four": {}, "two": {"model_config.peer_config.num_heads": 2}}}, "seeds": [1, 2]},
                       BASE, [TEMPLATE[0], "\n".join(wall), *TEMPLATE[1:]])
    def go_on(runs, *words):
        process = subprocess.Popen([python, *COMMAND[1:], *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "FAKE_STEP": "0.05"})
        until(lambda: process.poll() is not None or sum(len(p.read_text().splitlines()) for p in work.glob("out/*/ended.jsonl")) >= runs)
        if process.poll() is None: process.send_signal(signal.SIGINT)
        return ended(process)

    code, out = go_on(1, "--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, "--parallel", 1)
    folder, = (work/"out").iterdir()
    assert code == 130, out
    with (package/"page.py").open("a") as file: file.write("STYLE += ' '\n")
    code, out = go_on(2, "--resume", "--output-dir", work/"out", "--parallel", 1)
    begun = [json.loads(line)["run"] for line in (folder/"begun.jsonl").read_text().splitlines()]
    assert code == 130 and "3 of 4 runs to do" in out and begun.count(begun[0]) == 1, out
    with (package/"models"/"mla.py").open("a") as file: file.write("\n")
    code, out = go_on(4, "--resume", "--output-dir", work/"out", "--parallel", 1)
    assert code == 2 and "Traceback" not in out and "the package's source changed" in out, out


@pytest.mark.slow
def test_a_signal_while_there_is_nothing_to_save(tmp_path):
    "SIGUSR1 while the notebook imports: PREEMPTED at once, with the notebook as far as it was, and taken up again"
    work = fake_study(tmp_path, seeds=[1], axes={"heads": {"four": {}}})
    book = json.loads((work/"template.ipynb").read_text())
    book["cells"][1]["source"] = "import time\nprint('importing')\nif not resume: time.sleep(60)\n" + "".join(book["cells"][1]["source"])
    (work/"template.ipynb").write_text(json.dumps(book))
    process = launch("--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", 0, FAKE_STEP=0)
    run = until(lambda: [p.parent for p in (work/"out").glob("*/runs/001*/notebook.ipynb") if "importing\\n" in p.read_text()])[0]
    os.kill(read_json(run/"status.json")["pid"], signal.SIGUSR1)
    code, out = ended(process)
    assert code == 0 and "stopped by SIGUSR1; it has saved, and goes on (1 of 3 times)" in out, out
    assert read_json(run/"status.json")["attempt"] == 2


def memory_group(limit: int) -> Path | None: # None where this process may not make one
    "A control group that may have so many bytes"
    for top, file in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        group = top/f"peer-nb-{os.getpid()}"
        try:
            if not top.is_dir(): continue
            group.mkdir()
            (group/file).write_text(str(limit))
            return group
        except OSError:
            if group.is_dir(): group.rmdir()


def test_a_run_that_the_system_kills_for_want_of_memory(tmp_path):
    "FAILED: out of memory, written by the runner, with the page of what the run had got to"
    if (group := memory_group(700 << 20)) is None: pytest.skip("may not make a control group")
    try:
        work = fake_study(tmp_path, seeds=[1], axes={"heads": {"four": {}}})
        book = json.loads((work/"template.ipynb").read_text())
        book["cells"][2]["source"] = "print('before')\nhoard = [bytearray(1 << 24) for _ in range(200)]"
        (work/"template.ipynb").write_text(json.dumps(book))
        words = f"echo $$ > {group}/cgroup.procs; exec \"$@\""
        command = ["sh", "-c", words, "sh", sys.executable, "-c", "import sys; from peer_nb.running.command import main; sys.exit(main())", "--study", work/"study.yaml", "--output-dir", work/"out", "--gpus", "0"]
        said = subprocess.run([*map(str, command)], capture_output=True, text=True)
        run, = (work/"out").glob("*/runs/001*")
        assert said.returncode == 1 and "out of memory" in said.stdout, said.stdout + said.stderr
        assert read_json(run/"status.json")["error"]["kind"] == "out of memory" and Run(run).state == "FAILED"
        assert "before" in (run/"report.html").read_text()
    finally: group.rmdir()
