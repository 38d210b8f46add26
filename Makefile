# Two commands, each from nothing: make quickstart, make test.
# PIP_FLAGS reaches pip, say `make quickstart PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"`
# for the CPU build of torch on Linux (a tenth of the download).

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock $(PIP_FLAGS)

# One thread a test worker: two workers of many threads each are slower than one.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
quickstart: export HF_HUB_OFFLINE = 1

.PHONY: quickstart test format lock clean

quickstart: .venv/demo.stamp
	$(BIN)/cuvee quickstart

test: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The newest set of packages that the ranges in pyproject.toml allow; run the tests before committing it.
# A local version, such as that of torch's CPU build, is no pin for others.
lock:
	$(PYTHON) -m venv --clear .venv/lock
	.venv/lock/bin/python -m pip install --quiet $(PIP_FLAGS) '.[demo,test,dev]'
	.venv/lock/bin/python -m pip freeze --exclude cuvee | sed 's/+cpu$$//' > requirements.lock

.venv/demo.stamp: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the pinned packages into .venv (a few minutes the first time) ..."
	$(INSTALL) --editable '.[demo]'
	touch $@

.venv/test.stamp: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the pinned packages into .venv (a few minutes the first time) ..."
	$(INSTALL) --editable '.[demo,test,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
