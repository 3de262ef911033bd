# Every target does its own set-up: a virtual environment in .venv, dependencies
# held to the versions in constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# A checkout at the root of sys.path would shadow Jupyter's `comm`.
export PYTHONSAFEPATH := 1

.PHONY: help install run test test-slow tools lint bench gpu-check build clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## only the set-up

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "onecast needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: install ## the demo: 2 tensor-parallel workers answer the shipped batch (ARGS="..." passes options on)
	@$(BIN)/onecast demo $(ARGS)

test: install tools ## the tests; ends with pytest's closing line (ARGS="-k name")
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

test-slow: install tools ## the long ones: soak, fuzzing, kills, larger models
	$(BIN)/python -m pytest -m slow $(ARGS)

# Debian's packages that tests use: two hosts made of network namespaces, a real browser, a real
# Prometheus. Without one of them its tests are skipped, and say so. Prometheus is only unpacked, here:
# to install it would start a server.
UNPACKED := $(CURDIR)/build/tools
export PATH := $(PATH):$(UNPACKED)/usr/bin

tools:
	@missing=; for tool in ip:iproute2 chromium:chromium; do \
	  command -v $${tool%%:*} >/dev/null || missing="$$missing $${tool##*:}"; done; \
	test -z "$$missing" || { test "$$(id -u)" = 0 && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing >/dev/null; } \
	  || echo "missing, and cannot be installed here:$$missing; the tests that need it will be skipped"
	@command -v promtool >/dev/null || { mkdir -p $(UNPACKED) && cd $(UNPACKED) && \
	  { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; } && \
	  dpkg -x prometheus_*.deb . && rm prometheus_*.deb; } \
	  || echo "prometheus is missing and cannot be unpacked here: the tests with it will be skipped"

lint: install ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## measure everything that is claimed here (ARGS="--quick")
	$(BIN)/onecast bench comm $(ARGS)
	$(BIN)/onecast bench telemetry $(ARGS)
	$(BIN)/onecast bench blocks $(ARGS)
	$(BIN)/onecast bench step $(ARGS)
	$(BIN)/onecast bench e2e $(ARGS)
	$(BIN)/onecast bench nodes $(ARGS)

# No set-up: it is for machines that have torch and no network.
gpu-check: ## the tests and benchmarks that need a GPU (ARGS="--json FILE")
	@PYTHONPATH=.links$(if $(PYTHONPATH),:$(PYTHONPATH)) $(or $(wildcard $(BIN)/python),$(PYTHON)) -P -m onecast.runtime.gpu_check $(ARGS)

build: install ## the wheel, into dist/
	rm -rf build
	$(BIN)/python -m build --wheel --outdir dist .

clean: ## remove the virtual environment and what was built
	rm -rf $(VENV) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
