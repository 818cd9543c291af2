# The two commands that matter: `make demo` runs a real study, `make test` runs what CI runs.
# Both start from a bare clone with Python >= 3.11 and make; a second call finds the environment and starts at once.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
DEMO   := demo_results
# in a home of its own: what is tested, or shown on the site, neither finds nor changes what its maker keeps
ALONE  := $(BIN)/python tests/own_home.py

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test test-alone test-full renumber example export pages readme docs clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo
	@echo "TORCH='torch==2.12.0 --index-url URL' chooses another torch; PYTHON=python3.12 another Python;"
	@echo "DEMO_FLAGS=--fresh computes the demo's runs also where an earlier study has them."

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"peer_nb needs Python >= 3.11; $(PYTHON) is {v[0]}.{v[1]}. Choose another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that nothing below can pull in another build of it
$(VENV)/torch: $(BIN)/python constraints.txt
	$(PIP) install --quiet $$(grep -E '^pip==' constraints.txt)
	$(PIP) install --quiet $(TORCH)
	@grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt
	@$(PIP) list --format=freeze | grep -E '^torch==' | sed 's/+.*//' >> $(VENV)/constraints.txt
	@( $(PIP) list --format=freeze | grep -E '^triton==' || grep -E '^triton==' constraints.txt ) >> $(VENV)/constraints.txt
	@touch $@

$(VENV)/base: $(VENV)/torch settings.ini setup.py
	$(PIP) install --quiet -c $(VENV)/constraints.txt setuptools wheel
	PYTHONWARNINGS=ignore $(PIP) install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e .
	@touch $@

$(VENV)/dev: $(VENV)/base
	PYTHONWARNINGS=ignore $(PIP) install --quiet -c $(VENV)/constraints.txt --no-build-isolation -e '.[dev,eval]'
	@touch $@

install: $(VENV)/base ## the environment that users need, in .venv
install-dev: $(VENV)/dev ## the same with what tests and docs need

demo: $(VENV)/base ## a real ablation study on Python's own text, offline, in minutes
	$(BIN)/peer-ablate --study configs/demo_study.yaml --output-dir $(DEMO) --gpus 0 $(DEMO_FLAGS)

test: $(VENV)/dev ## all that CI checks: sync, notebooks, pytest, docs, wheel
	$(BIN)/python -m pytest tests/test_sync.py -q
	@$(ALONE) $(MAKE) --no-print-directory test-alone

test-alone: $(VENV)/dev
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/nbdev_test --n_workers 2 $(PAGE_FLAGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -q -n 2 --durations=8 --deselect tests/test_sync.py $(TEST_FLAGS)

test-full: export TEST_FLAGS += --slow
test-full: export PAGE_FLAGS = --flags slow
test-full: test ## the same with the long campaigns, and the cells of pages that train for minutes

renumber: $(VENV)/dev ## number the pages of each room in reading order, follow with links and sidebar
	$(BIN)/python tests/house.py

export: $(VENV)/dev ## write the package from the notebooks, clean the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

pages: $(VENV)/dev ## run every notebook, or those of PAGES="…", and store outputs, for the site
	TRITON_INTERPRET=1 $(ALONE) $(BIN)/python tests/site_check.py run $(PAGES)
	$(BIN)/nbdev_clean

readme: $(VENV)/dev ## write README.md from nbs/index.ipynb
	$(BIN)/python tests/site_check.py readme

docs: $(VENV)/dev ## build the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto, which is not on the PATH. Install it from https://quarto.org/docs/get-started/ and run 'make docs' again."; exit 2; }
	$(BIN)/python -c "from pathlib import Path; from plotly.offline import get_plotlyjs as js; Path('nbs/example/plotly.min.js').write_text(js())"
	@touch README.md   # newer than its notebook, else nbdev writes it anew, in its own way
	$(BIN)/nbdev_docs

example: $(VENV)/dev ## publish the newest study of the demo on the site
	$(BIN)/python tests/site_check.py example "$$(ls -td $(DEMO)/*/ | head -n 1)"

clean: ## remove what was built (the environment stays)
	rm -rf _proc _docs build dist *.egg-info nbs/nbdev.yml
