# `make serve` and `make test` work as the first command on a fresh machine: they create .venv and install.
#
# TORCH is where torch comes from: any requirement or options that pip takes. The CPU build of 2.13.0 is what is tested.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

# What the kernels decide: `make test-kernels` runs it on every instruction set of this machine, and with torch.
KERNEL_TESTS := $(addprefix tests/integration/test_, batch_invariance.py exactness.py exactness_sharded.py logprobs.py \
	model_logits.py model_runner.py prefix_sharing.py sampling_exactness.py) \
	tests/e2e/test_embedded_model.py tests/e2e/test_serving.py

.PHONY: install serve test test-slow test-kernels coverage mutation lint types format clean

install: $(INSTALLED)

# Compiles the C++ kernels, too.
$(INSTALLED): pyproject.toml Makefile $(wildcard engine/kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test]'
	touch $@

serve: install
	$(VENV)/bin/ryzanstein serve

# Unit tests keep one core busy each. The others start several processes themselves.
test: lint types
	$(VENV)/bin/python -m pytest -n 2 tests/architecture tests/unit
	$(VENV)/bin/python -m pytest tests/e2e tests/fault tests/integration

test-slow: install
	$(VENV)/bin/python -m pytest -m slow

test-kernels: install
	for kernels in $$($(VENV)/bin/python -m tests.kernels); do \
		echo "--kernels $$kernels"; $(VENV)/bin/python -m pytest --kernels $$kernels $(KERNEL_TESTS) || exit; \
	done

# Every process counts: servers and orchestrators, and ranks although they are killed (tests/coverage_saver.py).
coverage: export PYTHONPATH := $(CURDIR)
coverage: install
	rm -f .coverage .coverage.*
	$(VENV)/bin/coverage run -m pytest; status=$$?; \
	$(VENV)/bin/coverage combine --quiet && $(VENV)/bin/python -m tests.coverage_report && exit $$status

# Small changes to the scheduler and the block bookkeeping, each of which some test should notice. CI=1 makes hypothesis
# draw the same examples for all. `mutmut show NAME` shows a survivor.
mutation: export CI := 1
mutation: install
	$(VENV)/bin/python -m pip install --quiet --editable '.[mutation]'
	rm -rf mutants
	$(VENV)/bin/mutmut run
	$(VENV)/bin/mutmut results
	$(VENV)/bin/mutmut export-cicd-stats
	@$(VENV)/bin/python -c 'import json; n = json.load(open("mutants/mutmut-cicd-stats.json")); \
		print("{:.1%} of {} mutants were noticed".format((n["killed"] + n["timeout"]) / n["total"], n["total"]))'

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants
