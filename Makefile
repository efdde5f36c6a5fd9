# Every target works alone on a fresh clone: Python >= 3.11, make and git are enough.
#   make setup   create .venv with the pinned dependencies     make lab    open JupyterLab on labs/
#   make demo    run the headline experiment                   make test   run every test
# PYTHON names the interpreter that creates .venv: make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

# No browser in CI or without a display. macOS always has a display, but sets neither variable.
DISPLAYS := $(DISPLAY)$(WAYLAND_DISPLAY)$(filter Darwin,$(shell uname))
LAB_FLAGS := $(if $(CI),--no-browser,$(if $(DISPLAYS),,--no-browser))
LAB_FLAGS += $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: setup lab demo test

setup: $(STAMP)

# nbgrader is there for its format and its gradebook: its panels in JupyterLab would ask students for an exchange folder.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "This project needs Python 3.11 or newer, and '$(PYTHON)' is not that." \
	       "Install one and name it: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[lab,teach,grade,test]'
	$(VENV)/bin/python -m jupyterlab.labextensions disable --level=sys_prefix @jupyter/nbgrader
	@touch $@

lab: setup
	$(VENV)/bin/python -m jupyterlab --ServerApp.root_dir=labs $(LAB_FLAGS)

demo: setup
	$(VENV)/bin/refusallab demo

# Every test, and every notebook in solutions/, whose outputs must come out as they are stored.
# One thread for each worker: two workers that each use every core slow each other down.
KERNEL := $(if $(filter Linux,$(shell uname)),--nbval-kernel-name refusallab,--nbval-current-env)
NBVAL := --nbval $(KERNEL) --nbval-cell-timeout 300 --nbval-sanitize-with tests/sanitize.cfg

test: setup
	JUPYTER_PATH=$(CURDIR)/refusallab/course/grade OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(NBVAL) tests solutions
