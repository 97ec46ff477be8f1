# make demo, make test, make notebooks, make lab, make bench: each works as the first command on a fresh clone. It makes .venv
# (bench: .venv-bench), installs the tested versions of constraints.txt, then runs; the second call installs nothing. All but demo
# also install what chapter 9 needs, DeepSpeed, Ray and vLLM, where those run: on Linux on x86-64.
#
#   make demo ARGS="--seed 1"            more flags for rlhf-course demo
#   make demo TORCH=cpu                  another build of torch: cpu, cu126, cu130 … (PyTorch's own wheel index)
#   make test PYTHON=/path/to/python     an environment you already have; nothing is installed
#   make test TESTS=tests/test_ppo.py    some of the tests
#   make bench ARGS="--parts sft"        some of the benchmark; ARGS=--help for more
#   make notebooks ARGS="3 4"            some of the chapters; ARGS=--help for more
#   make distributed TORCH=cu130         chapter 9's engines for a machine with NVIDIA GPUs (by itself where torch sees one)

SYSTEM_PYTHON = python3
PYTHON =
TORCH =
ARGS =
TESTS = tests
# One process a core, four at most, since each takes about half a gigabyte of memory. Tests of one xdist_group share something
# that is slow to make, an engine or ranks: they go to one process, the largest groups first.
PYTEST_ARGS = -q -n auto --maxprocesses 4 --dist loadgroup

ifeq ($(PYTHON),)
RUN := .venv/bin/python
DEV := .venv/installed-dev
LAB := .venv/installed-lab
ENGINES := .venv/installed-distributed
BENCH := .venv-bench/installed
PEERS := .venv-bench/bin/python
else
RUN := $(PYTHON)
PEERS := $(PYTHON)
endif

INDEX := $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))
# One thread a process: the tests are small, and threads of several processes fight over the cores.
OFFLINE := TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
QUIET := OMP_NUM_THREADS=1 $(OFFLINE)

PLATFORM := $(shell uname -sm)
LOCK := rlhf_course/planning/engines-cpu.txt
# Nothing is compiled, and no second torch is fetched for a build environment.
BUILD := DS_BUILD_OPS=0 .venv/bin/python -m pip install --no-build-isolation

.NOTPARALLEL:  # two pips in one environment
.PHONY: help demo test notebooks lab distributed bench check format clean

help:  ## this list
	@echo "make TARGET [VARIABLE=…], see the top of the Makefile for the variables"
	@sed -n 's/^\([a-z]*\):.*## /  \1	/p' Makefile

demo: $(DEV)  ## train GPT, SFT, reward model and PPO-ptx, and write report.html
	$(RUN) -m rlhf_course demo $(ARGS)

test: $(DEV) $(ENGINES)  ## run all tests
	@$(QUIET) $(RUN) -m pytest $(PYTEST_ARGS) $(TESTS)

notebooks: $(DEV) $(ENGINES)  ## print chapters/ and solutions/ from manuscript/; what has not changed stays
	@$(OFFLINE) $(RUN) -m rlhf_course.coursework.build $(ARGS)

lab: $(LAB) $(ENGINES)  ## open JupyterLab at the chapters
	$(RUN) -m jupyter lab --ServerApp.root_dir=. --FileContentsManager.preferred_dir=chapters $(ARGS)

distributed: $(ENGINES)  ## install DeepSpeed, Ray and vLLM for chapter 9, and say whether all is well
	$(RUN) -m rlhf_course doctor $(ARGS)

bench: $(BENCH)  ## measure ours against TRL, transformers and vLLM (about 40 minutes), in .venv-bench
	@$(OFFLINE) $(PEERS) benchmarks/bench.py $(ARGS)

check: $(DEV)  ## ruff: lint and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(DEV)  ## ruff: mend what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove the environment and caches; runs and reports stay
	rm -rf .venv .venv-bench build dist *.egg-info .pytest_cache .ruff_cache
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

# With a CUDA build of torch and a GPU (or TORCH=cu…) vLLM's own wheel; else its CPU build, installed as it is listed.
.venv/installed-distributed: .venv/installed-dev $(LOCK)
ifeq ($(PLATFORM),Linux x86_64)
	@if .venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then \
	    echo "Chapter 9's engines need Python 3.11 or later: left out, and their tests are skipped."; \
	elif .venv/bin/python -c 'import sys, torch; \
	        gpu = "$(TORCH)".startswith("cu") or torch.cuda.is_available(); \
	        sys.exit(not (gpu and torch.version.cuda))'; then \
	    echo "Installing DeepSpeed, Ray and vLLM for CUDA, once."; \
	    $(BUILD) $(INDEX) -c constraints.txt -e ".[dev,distributed]"; \
	else \
	    echo "Installing DeepSpeed, Ray and vLLM for CPUs, once (a minute or more, as the network is)."; \
	    $(BUILD) --no-deps -r $(LOCK); \
	fi
else
	@echo "Chapter 9's engines (DeepSpeed, Ray, vLLM) are for Linux on x86-64: left out, and their tests are skipped."
endif
	@touch $@

# The peers have an environment of their own, so that nothing of theirs is in the course's.
.venv-bench/installed: pyproject.toml constraints.txt $(LOCK)
	@echo "Installing into .venv-bench, once (some minutes, as the network is)."
	$(SYSTEM_PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install $(INDEX) -c constraints.txt -e ".[dev,bench]"
ifeq ($(PLATFORM),Linux x86_64)
	$(BUILD:.venv/%=.venv-bench/%) --no-deps -r $(LOCK)
endif
	@touch $@
