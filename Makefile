# make demo, make test, make notebooks, make lab: each works as the first command on a fresh clone. It makes .venv, installs the
# tested versions of constraints.txt, then runs; the second call installs nothing.
#
#   make demo ARGS="--seed 1"            more flags for rlhf-course demo
#   make demo TORCH=cpu                  another build of torch: cpu, cu126, cu130 … (PyTorch's own wheel index)
#   make test PYTHON=/path/to/python     an environment you already have; nothing is installed
#   make test TESTS=tests/test_ppo.py    some of the tests
#   make notebooks ARGS="3 4"            some of the chapters; ARGS=--help for more

SYSTEM_PYTHON = python3
PYTHON =
TORCH =
ARGS =
TESTS = tests
# One process a core, four at most, since each takes about half a gigabyte of memory.
PYTEST_ARGS = -q -n auto --maxprocesses 4 --dist worksteal

ifeq ($(PYTHON),)
RUN := .venv/bin/python
DEV := .venv/installed-dev
LAB := .venv/installed-lab
else
RUN := $(PYTHON)
endif

INDEX := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))
# One thread a process: the tests are small, and threads of several processes fight over the cores.
OFFLINE := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
QUIET := OMP_NUM_THREADS=1 $(OFFLINE)

.PHONY: help demo test notebooks lab check format clean

help:  ## this list
	@echo "make TARGET [VARIABLE=…], see the top of the Makefile for the variables"
	@sed -n 's/^\([a-z]*\):.*## /  \1	/p' Makefile

demo: $(DEV)  ## train GPT, SFT, reward model and PPO-ptx, and write report.html
	$(RUN) -m rlhf_course demo $(ARGS)

test: $(DEV)  ## run all tests
	@$(QUIET) $(RUN) -m pytest $(PYTEST_ARGS) $(TESTS)

notebooks: $(DEV)  ## print chapters/ and solutions/ from manuscript/; what has not changed stays
	@$(OFFLINE) $(RUN) -m rlhf_course.coursework.build $(ARGS)

lab: $(LAB)  ## open JupyterLab at the chapters
	$(RUN) -m jupyter lab --ServerApp.root_dir=. --FileContentsManager.preferred_dir=chapters $(ARGS)

check: $(DEV)  ## ruff: lint and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(DEV)  ## ruff: mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove the environment and caches; runs and reports stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find rlhf_course tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so an interrupted installation is simply taken up again.
.venv/installed-dev: EXTRAS = dev
.venv/installed-lab: EXTRAS = dev,notebooks
.venv/installed-%: pyproject.toml constraints.txt
	@$(SYSTEM_PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); \
	    sys.exit(None if ok else "Python 3.10 to 3.13 is needed; this is " + sys.version.split()[0] \
	    + ". Name another one: make … SYSTEM_PYTHON=python3.12")'
	@echo "Installing into .venv, once (a minute or more, as the network is)."
	$(SYSTEM_PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(INDEX) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@
