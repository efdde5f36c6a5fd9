# Every target works alone on a fresh clone: Python >= 3.11, make and git are enough.
#   make setup      what students need, in .venv      make lab     JupyterLab on labs/
#   make develop    what teachers and authors need    make demo    the headline experiment
#   make play       the play page, in build/          make site    the book site, in build/site
#   make teach      slides, question exports: in build/teach    make book    the labs as a PDF, in build/
#   make check      lint, format, types               make test    every test that needs no special part
#   make test-fast  no notebooks, nothing slow        make test-lab LAB=02
#   make test-sandbox, test-browser, test-nightly, test-real, test-cpu      make test-all
# PYTHON names the interpreter that creates .venv: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
# Python compiles what it imports; compiling everything that pip unpacks takes longer than most of it is ever used.
# Some containers forbid it to keep what it compiled: then each process compiles torch and its kin anew.
unexport PYTHONDONTWRITEBYTECODE
CONSTRAINTS := --constraint constraints.txt
INSTALL := $(RUN) pip install --no-compile $(CONSTRAINTS) --editable

# No browser in CI or without a display. macOS always has a display, but sets neither variable.
DISPLAYS := $(DISPLAY)$(WAYLAND_DISPLAY)$(filter Darwin,$(shell uname))
LAB_FLAGS := $(if $(CI),--no-browser,$(if $(DISPLAYS),,--no-browser))
LAB_FLAGS += $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: setup develop lab demo play site book teach check test test-fast test-slow test-notebooks test-lab test-sandbox \
	test-browser test-nightly test-real test-cpu test-colab test-all colab-check package check-links

setup: $(VENV)/.students
develop: $(VENV)/.developers

$(VENV)/.students: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This project needs Python 3.11 or newer, and '$(PYTHON)' is not that." \
	       "Install one and name it: make setup PYTHON=python3.12" >&2; exit 1; }
	rm -rf refusal_mechanics_labs.egg-info # of an earlier version: its entry points would win over the new ones
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[lab,gguf]'
	@touch $@

# nbgrader is there for its format and its gradebook: its panels in JupyterLab would ask students for an exchange folder.
$(VENV)/.developers: $(VENV)/.students
	$(INSTALL) '.[lab,gguf,teach,grade,site,test]'
	$(RUN) jupyterlab.labextensions disable --level=sys_prefix @jupyter/nbgrader
	@touch $@

# With the commands of the course on the PATH of its terminals.
lab: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) jupyterlab --ServerApp.root_dir=labs $(LAB_FLAGS)

demo: setup
	$(VENV)/bin/refusallab demo

play: setup
	$(VENV)/bin/python docs/play/build.py

site: develop
	PYTHONPATH=. $(VENV)/bin/python docs/site/build.py

book: develop
	PYTHONPATH=. $(VENV)/bin/python docs/site/build.py book

teach: develop
	$(RUN) teach

check: develop
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy

# One thread for each worker: two workers that each use every core slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest
PARALLEL := -n 2 --dist loadfile
TESTS := tests grader/tests
SPECIAL := sandbox or browser or nightly or cpu or real

# Notebooks: every output must come out as it is stored. With REFUSALLAB_DEADLINE (seconds since 1970) in the
# environment, none is begun after it, and those that were not are listed.
KERNEL := $(if $(filter Linux,$(shell uname)),--nbval-kernel-name refusallab,--nbval-current-env)
NBVAL := --nbval $(KERNEL) --nbval-cell-timeout 300 --nbval-sanitize-with tests/sanitize.cfg
NOTEBOOKS := JUPYTER_PATH=$(CURDIR)/refusallab/sandbox TQDM_DISABLE=1 $(PYTEST) $(NBVAL)

test: test-fast test-slow test-notebooks

# One worker: a second one would import everything once more, which takes a third of the time.
test-fast: develop
	$(PYTEST) -m "not (slow or $(SPECIAL))" $(TESTS)

test-slow: develop
	$(PYTEST) $(PARALLEL) -m "slow and not ($(SPECIAL))" $(TESTS)

test-notebooks: develop
	$(NOTEBOOKS) $(PARALLEL) --no-loadscope-reorder solutions

test-lab: develop
	$(if $(LAB),,$(error Name the lab: make test-lab LAB=02))
	$(NOTEBOOKS) $(wildcard tests/test_lab$(LAB).py) $(wildcard solutions/$(LAB)_*.ipynb)

# Three workers: submissions that sleep or loop are waited for, most of the time.
test-sandbox: develop
	$(PYTEST) -n 3 --dist loadfile -m "sandbox and not nightly" $(TESTS)

test-browser: develop
	$(PYTEST) -n 2 --dist loadgroup -m "browser and not nightly" tests

# What takes minutes, whole labs above all: unsolved and with wrong answers they fail at their checks and nowhere
# else. They stand in one file, so each goes to the next free worker.
test-nightly: develop
	$(PYTEST) -n 2 -m nightly $(TESTS)

# A pretrained model, fetched where it is not on this computer yet.
test-real: develop
	$(PYTEST) -m real tests

test-cpu: develop
	$(PYTEST) -m cpu tests

# The archive on a machine that has Python and torch, and not the course.
test-colab: develop
	$(PYTEST) tests/test_colab.py

# The released labs on Debian 13, in Colab's way of doing things. Needs root and debootstrap.
colab-check: develop
	$(VENV)/bin/python tests/colab_check.py

# What a package index takes, in dist/.
package: develop
	$(INSTALL) '.[release]'
	rm -rf dist
	$(RUN) build
	$(RUN) twine check --strict dist/*

# Addresses in texts and notebooks, over the network.
check-links: develop
	$(INSTALL) '.[links]'
	$(RUN) pytest --check-links --check-links-ignore 'https://colab.*' *.md docs solutions smallmodels/*.md

test-all: test test-sandbox test-browser test-nightly test-real test-cpu
