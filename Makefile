# Every target makes .venv itself when it is missing, and leaves it alone when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
export TF_CPP_MIN_LOG_LEVEL := 3
export PYTHONWARNINGS := ignore
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install run test check lab docs bench readme clean

install: $(VENV)/installed

$(VENV)/installed: settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "brain_vit needs Python 3.11, 3.12 or 3.13: name one with 'make PYTHON=python3.12 install'."; exit 2; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || { rm -rf $(VENV); echo "Python cannot make a virtual environment here: on Debian, install python3-venv."; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,jax]"
	touch $@

# The main job: train on phantoms, evaluate on held-out ones, draw where the model looked.
# It starts from the bundled weights: from scratch, the first few thousand images teach nothing that shows.
run: install
	$(BIN)/brain_vit train phantom --epochs 5

# A fresh export must equal what is committed, README.md must equal what index.ipynb says.
check: install
	rm -rf .check && cp -r brain_vit .check && nbdev_export
	diff -r -x __pycache__ brain_vit .check || { rm -rf .check; echo "brain_vit/ was not what the notebooks export. It is now: commit it."; exit 1; }
	rm -rf .check
	$(MAKE) --silent readme README=.README.check && cmp README.md .README.check && rm .README.check || { rm -f .README.check; echo "README.md is not what nbs/index.ipynb says: run 'make readme'."; exit 1; }

test: check
	nbdev_test --n_workers 3 --do_print
	$(BIN)/python -m pytest -n 3 --dist loadfile tests

lab: install
	$(BIN)/jupyter lab nbs

README ?= README.md
readme: install
	$(BIN)/jupyter nbconvert --log-level WARN --no-input --to markdown --stdout nbs/index.ipynb | sed -E 's#\]\(([a-z0-9_]+\.ipynb|images/)#](nbs/\1#g' > $(README)

docs: install
	@command -v quarto > /dev/null || { echo "The site is rendered by Quarto, which is not installed: get it from https://quarto.org/docs/get-started and run 'make docs' again."; exit 2; }
	nbdev_docs
	$(MAKE) readme

# The peers live in an environment of their own.
BENCH := .bench
bench: $(BENCH)/installed
	$(BENCH)/bin/python benchmarks/phantom.py --json
	$(BENCH)/bin/python benchmarks/phantom.py --stream 100000 --json
	$(BENCH)/bin/python benchmarks/speed.py --json
	$(BENCH)/bin/python benchmarks/speed.py --only growth --json

$(BENCH)/installed: settings.ini setup.py benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[jax]" -r benchmarks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) .check .README.check build dist *.egg-info _proc _docs .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
