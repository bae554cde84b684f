# Everything a developer runs; `make help` lists it. Needs Python 3.11 to 3.13 with pip, and git.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=

# uv trusts the certificates this machine trusts, as pip does.
export UV_SYSTEM_CERTS ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo quick test test-fuzz test-cluster test-deploy bench-peers lint types docs lock clean

PYTEST = $(BIN)/python -m pytest
# A file at a time on each core: much of a test on Ray is waiting. Files keep together, because their tests share runs, and
# come in the order of tests/conftest.py: the longest first.
SIDE_BY_SIDE = --numprocesses auto --dist loadfile --no-loadscope-reorder

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.stamp  ## .venv with the package and the exact versions of requirements.lock (a few GB on first use)

demo: env  ## draw the emoji data set, run the whole pipeline on it, write its report under runs/
	$(BIN)/mmkt fetch openmoji --out data/openmoji
	$(BIN)/mmkt run jobs/configs/openmoji.yaml

quick: env  ## while you type: the tests that need no Ray and are not slow
	$(PYTEST) --numprocesses auto -m "not ray and not slow and not cluster and not deploy" $(ARGS)

test: env  ## run the tests; ARGS="-k fusion tests/models" picks some
	$(PYTEST) $(SIDE_BY_SIDE) -m "not cluster and not deploy" $(ARGS)

test-fuzz: env  ## 20,000 damaged files through every reader and decoder, 2 min
	MMKT_FUZZ=20000 $(PYTEST) tests/samples/test_fuzz.py $(ARGS)

# One process more than cores: some of these tests mostly wait for Ray to notice what is gone.
test-cluster: env  ## the rest: faults, object stores, several nodes, whole programs. On hosts: root, openssh-server, rsync, iproute2
	$(PYTEST) $(SIDE_BY_SIDE) --numprocesses $$(($$(nproc) + 1)) -m cluster $(ARGS)

test-deploy: env  ## a Docker daemon; a Slurm: root, slurmctld, slurmd, slurm-client, munge, iproute2. Not part of .ci/run
	$(PYTEST) -m deploy $(ARGS)

bench-peers: $(VENV)/peers/.stamp  ## photos and small images, this package against Daft and Ray Data by themselves
	$(BIN)/python jobs/benchmark_peers.py photos
	$(BIN)/python jobs/benchmark_peers.py small --rows 50000

lint: env  ## ruff over all Python files
	$(BIN)/ruff check .

types: env  ## mypy over the package and jobs/
	$(BIN)/mypy

docs: $(VENV)/docs/.stamp  ## docs/ as a site in site/, by MkDocs in an environment of its own
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict

lock: $(BIN)/uv  ## refresh the three lock files: the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --generate-hashes --quiet \
		--custom-compile-command "make lock" --output-file requirements.lock
	$(BIN)/uv pip compile --group pyproject.toml:peers --universal --python-version 3.11 --upgrade --generate-hashes --quiet \
		--custom-compile-command "make lock" --output-file jobs/peers.lock
	$(BIN)/uv pip compile --group pyproject.toml:docs --universal --python-version 3.11 --upgrade --generate-hashes --quiet \
		--custom-compile-command "make lock" --output-file docs/requirements.lock

clean:  ## remove .venv, the site and the caches; keeps data/ and runs/
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# uv comes through pip, at the version and with the hashes of the lock (any version while there is no lock yet).
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("Python 3.11 to 3.13 needed, $(PYTHON) is %d.%d: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv $(VENV)
	sed -n '/^uv==/,/# via/p' $(or $(wildcard requirements.lock),/dev/null) > $(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(wildcard requirements.lock),--require-hashes -r $(VENV)/uv.lock,uv)

# Rebuilt when the lock or pyproject.toml changes. --quiet: also no warning where a link from uv's cache must be a copy.
# Compiled once here: uv does not by itself, and each of Ray's many processes would (torch's import 5 s instead of 2)
# where nothing may be written at run time (PYTHONDONTWRITEBYTECODE, a read-only image).
$(VENV)/.stamp: pyproject.toml requirements.lock | $(BIN)/uv
	@echo "installing requirements.lock into $(VENV)"
	$(BIN)/uv pip sync --quiet --require-hashes --compile-bytecode --python $(BIN)/python requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -c "from mmkt_ray.encoders.text import compile_kernels; compile_kernels()"
	@$(BIN)/python -m compileall -q mmkt_ray
	@touch $@

# Beside the environment, not in it: only the peers' own programs look there.
$(VENV)/peers/.stamp: jobs/peers.lock $(VENV)/.stamp
	$(BIN)/uv pip install --quiet --require-hashes --python $(BIN)/python --target $(VENV)/peers -r jobs/peers.lock
	@touch $@

$(VENV)/docs/.stamp: docs/requirements.lock | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(VENV)/docs
	$(BIN)/uv pip sync --quiet --require-hashes --python $(VENV)/docs/bin/python docs/requirements.lock
	@touch $@
