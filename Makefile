# Two commands on a fresh machine do everything: `make demo` and `make test`. Each makes its own .venv with plain pip.
# `quick` is the inner loop; `check` is what a commit must pass; `bench` prints the benchmarks' JSON lines.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out
# pyproject's `all` without studio, which no test needs; tests/test_packaging.py holds the two together
TESTED := tune,demo,hub,quant,ray,static,multimodal,serve,mcp,otel,llamacpp,edge,federated

.PHONY: demo quick test check bench bench-peers docs clean
.DEFAULT_GOAL := demo

$(VENV)/.demo: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: https://www.python.org/downloads/"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[tune,demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --editable '.[$(TESTED),dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable '.[$(TESTED),dev,bench]'
	touch $@

demo: $(VENV)/.demo  ## the whole circle on real data
	$(BIN)/sartor demo --out $(DEMO_OUT) --replace

quick: $(VENV)/.dev  ## the default tier: minutes, no network
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test: $(VENV)/.dev  ## every tier
	$(BIN)/sartor assets install starter
	$(BIN)/sartor assets install home-intents
	$(BIN)/sartor assets install chitchat
	$(BIN)/sartor assets install construction-faq
	$(BIN)/sartor assets install minilm
	$(BIN)/sartor assets install efficientnet-lite0
	$(BIN)/sartor assets install whisper-tiny-en
	$(BIN)/sartor assets install textile
	-$(BIN)/sartor assets install stamps  # Debian only
	-$(BIN)/sartor assets install prompts-en
	$(BIN)/python -m pytest -q -n 2 --dist worksteal
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations 25 -m "(circle or services or browser) and not alone"
	$(BIN)/python -m pytest -q --durations 10 -m "(circle or services or browser) and alone"

check: $(VENV)/.dev  ## lint and types
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/mypy

bench: $(VENV)/.bench  ## each benchmark's JSON line; Sartor against its peers is `bench-peers`, which makes a venv for each
	for script in packing savings ablation scaling quant resume revoke labels personal dedup serve chaos whisper multimodal; do \
	  env -u OPENBLAS_CORETYPE $(BIN)/python benchmarks/$$script.py --json || exit 1; done

bench-peers: $(VENV)/.dev  ## several GB of venvs, and an hour
	env -u OPENBLAS_CORETYPE $(BIN)/python benchmarks/train.py --json

docs: $(VENV)/.dev  ## every block of README and docs, run
	$(BIN)/python -m pytest -q -m "" tests/test_docs.py

clean:
	rm -rf $(VENV) $(DEMO_OUT)
