# `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(firstword $(wildcard $(foreach name,python3.11 python3,$(shell command -v $(name)))))
VENV := .venv
LOCKED := $(VENV)/.locked
READY := $(VENV)/.ready
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$(( n > 8 ? 8 : n )))
TRIALS ?= 20
PORT ?= 5000

# Recipes run the environment's own python, dvc, mlflow and lesionsam.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export MLFLOW_DISABLE_TELEMETRY := true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONHOME
unexport PYTHONDONTWRITEBYTECODE  # without compiled files every stage would compile torch and pandas anew: 20 s each

.PHONY: help setup demo test chaos lint types docs audit package tune ui report foundation evidence evidence-isic2018 benchmark web lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv from requirements.lock (once, and again when the lock changes)

# The stamps are written last, so that a set-up that broke off is never taken for done.
$(LOCKED): requirements.lock
	@rm -f $(LOCKED) $(READY)
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: Python 3.11 or later expected, got '$(PYTHON)'; name another: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up $(VENV): about 6.5 GB of disk, a few minutes of download the first time"
	@"$(PYTHON)" -m venv --clear $(VENV)
	@# uv is many times as fast as pip. It comes from the lock like everything else; where the index lacks it, pip installs the rest.
	@awk '/^[^ ]/ { is_uv = /^uv==/ } { print > ("$(VENV)/" (is_uv ? "uv.txt" : "rest.txt")) }' requirements.lock
	@$(VENV)/bin/python -m pip install --quiet --require-hashes -r $(VENV)/uv.txt \
	  && $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --require-hashes -r requirements.lock \
	  || $(VENV)/bin/python -m pip install --quiet --require-hashes -r $(VENV)/rest.txt
	@touch $(LOCKED)

$(READY): $(LOCKED) pyproject.toml
	@rm -f $(READY)
	@$(VENV)/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local core.no_scm true
	@touch $(READY)

demo: $(READY) ## the whole chain on generated images: data, boxes, training, results table, report
	dvc repro
	@echo
	@cat results/table.md
	@echo
	@echo "table     results/table.md"
	@echo "pictures  report/index.html"
	@echo "runs      make ui   (or: source $(VENV)/bin/activate, then: mlflow ui)"

test: $(READY) ## all tests
	python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --quiet

RUNS ?= 20
SEED ?= 0
chaos: $(READY) ## faults on purpose, and what must hold all the same: make chaos RUNS=20 SEED=0 (hours; the campaign of whole chains is by far the longest)
	python tests/chaos/run.py --runs $(RUNS) --seed $(SEED)

lint: $(READY) ## ruff, bandit, hadolint
	ruff check .
	ruff format --check .
	bandit --quiet --recursive --configfile pyproject.toml src stages
	hadolint Dockerfile

types: $(READY) ## pyright
	pyright --pythonpath $(VENV)/bin/python

docs: $(READY) ## this documentation as a site: build/docs/index.html, opens offline (a minute or two)
	python -m sphinx -b html -W --keep-going -q -d build/doctrees docs build/docs
	@echo "open build/docs/index.html"

AUDIT := .cache/audit
audit: ## known vulnerabilities of what requirements.lock pins, by pip-audit (needs the network; fetches pip-audit)
	@"$(PYTHON)" -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1
	$(AUDIT)/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

package: $(READY) ## the wheel in dist/; the wheel and its extras in fresh environments: python tests/package/fresh.py (needs the network)
	@rm -rf build  # setuptools would pack what an earlier build left there
	uv build --quiet --wheel --out-dir dist .
	@ls dist/*.whl

tune: $(READY) ## search for better parameters: make tune TRIALS=20
	python src/tune.py --trials $(TRIALS)

ui: $(READY) ## runs, curves, pictures and checkpoints in the browser: make ui PORT=5000
	@python -m lesionsam.tracking.ui --port $(PORT)

report: $(READY) ## report/index.html from what is there, training only what has changed
	dvc repro report
	@echo "open report/index.html"

foundation: $(READY) ## train the compact model again, of params.yaml's sizes (an hour of two cores; resumes)
	lesionsam foundation

evidence-isic2018: $(READY) ## the comparison on ISIC 2018 with SAM ViT-B: 14 GB, days on one GPU (resumes; estimates first)
	python benchmarks/comparison/isic2018.py --out evidence-isic2018

evidence: $(READY) ## the comparison on real pairs: make evidence FOLDER=path (hours; resumes)
	python benchmarks/comparison/run.py $(FOLDER) --out evidence

benchmark: $(READY) ## our training step beside the published one, attention, cache: ratios on this machine (a quarter of an hour of one core)
	@failed=0; for script in "step.py --components" "step.py --last 2 --precision bf16" "step.py --encoder lora --last 6 0" \
	  "step.py --encoder adapter --last 6 0" sam2_step.py attention.py cache.py; do \
	  echo "python benchmarks/$$script --write"; python benchmarks/$$script --write || failed=1; \
	done; exit $$failed

# Versions that are known to work together; nothing of them is kept beside the sources.
WEB_TOOLS := .cache/web
web: $(READY) ## the annotation page's JavaScript from its TypeScript (needs node 20 and npm; fetches two packages)
	npm install --prefix $(WEB_TOOLS) --no-save --no-package-lock --no-audit --no-fund --silent typescript@7.0.2 esbuild@0.28.2
	python -m lesionsam.annotation.bundle $(WEB_TOOLS)

lock: $(READY) ## requirements.lock from requirements.in (needs the network)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --no-annotate --upgrade requirements.in --output-file requirements.lock

clean: ## remove everything that is made: data, models, results, runs' scratch; keeps .venv, archives and MLflow's runs
	rm -rf data models results report dist build docs/reference docs/project .scratch .cache .pytest_cache .ruff_cache .hypothesis .dvc/cache .dvc/tmp
