# Two commands on a fresh machine do everything: `make demo` and `make test`. Each makes its own .venv with pip, by the versions and
# hashes of requirements/ (tools/lock.py). With LOCKED=no by plain pip, newest versions: for a GPU, or to see what became of the world.
# `quick` is the inner loop; `check` is what a commit must pass; `bench` writes benchmarks/results/NAME.json and the scoreboard.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
LOCKED ?= yes
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out
# pyproject's `all`; tests/test_packaging.py holds the two together
TESTED := tune,demo,hub,notebook,office,quant,ray,static,multimodal,serve,mcp,otel,llamacpp,studio,edge,federated,track

.PHONY: demo lock quick test assets test-default durations test-slow test-alone fuzz check bench bench-small bench-peers scoreboard docs site clean
.DEFAULT_GOAL := demo

$(VENV)/.demo: pyproject.toml $(wildcard requirements/*.lock)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: https://www.python.org/downloads/"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(LOCKED),yes)
	$(BIN)/python tools/lock.py install
	$(BIN)/python tools/lock.py constraints > $(VENV)/constraints.txt
else
	$(BIN)/python -m pip install --quiet --editable '.[tune,demo]'
	: > $(VENV)/constraints.txt
endif
	touch $@

comma := ,
# uv takes a quarter of pip's processor time. pip installs where it was told of another index, and where uv fails.
define INSTALL
	{ ! $(BIN)/python -m pip config list | grep -q index && $(BIN)/python -m pip install --quiet uv && \
	UV_SYSTEM_CERTS=1 UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --quiet --python $(BIN)/python \
	--constraint $(VENV)/constraints.txt --editable '$(1)'; } || \
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '$(1)'
endef

# upon the locked environment: what is locked stays at its version, and the tests' own packages are the newest that fit
$(VENV)/.dev: $(VENV)/.demo
	test ! -s $(VENV)/constraints.txt || $(BIN)/python tools/lock.py install-more
	$(call INSTALL,.[$(TESTED)$(comma)dev])
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(call INSTALL,.[$(TESTED)$(comma)dev$(comma)bench])
	touch $@

$(VENV)/.site: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[docs]'
	touch $@

lock: $(VENV)-lock/bin/uv  ## requirements/demo.lock anew, after a change of pyproject or for newer versions
	$(VENV)-lock/bin/python tools/lock.py write

$(VENV)-lock/bin/uv:
	test -x $(VENV)-lock/bin/python || $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv

demo: $(VENV)/.demo  ## the whole circle on real data
	$(BIN)/sartor demo --out $(DEMO_OUT) --replace

# the tier that pytest runs where no -m is given (pyproject.toml), without those that took long (tests/durations.json)
quick: $(VENV)/.dev  ## the quick tests of the default tier: two minutes, no network
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not circle and not services and not browser and not slow"

# one after the other, also under -j: two tiers at once would wait for each other's cores
test:  ## every tier
	$(MAKE) assets
	$(MAKE) test-default
	$(MAKE) test-slow
	$(MAKE) test-alone

assets: $(VENV)/.dev  ## what the slow tiers read
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

# AGAIN: more options, as of .ci/run for the tests that failed
test-default: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(AGAIN)

durations: $(VENV)/.dev  ## tests/durations.json anew: on an idle machine
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --record-durations

# those files alone that hold such tests: to collect all of them takes most of a minute
FILES_WITH = $$(grep -rlE 'mark\.($(1))' tests --include='test_*.py')

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 100 -m "(circle or services or browser) and not alone" $(call FILES_WITH,circle|services|browser) $(AGAIN)

# a cache of its own, since test-slow may run beside it
test-alone: $(VENV)/.dev
	$(BIN)/python -m pytest -q --durations 10 -o cache_dir=.pytest_cache/alone -m "(circle or services or browser) and alone" $(call FILES_WITH,alone) $(AGAIN)

# in CI, 1,000 each are part of test-slow
fuzz: $(VENV)/.dev  ## 10,000 inputs for each parser of what comes from outside
	SARTOR_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "" tests/attacks/test_fuzz.py

check: $(VENV)/.dev  ## lint and types
	$(BIN)/ruff check src tests benchmarks examples tools
	$(BIN)/ruff format --check src tests benchmarks examples tools
	$(BIN)/mypy

# Every program of benchmarks/ but the parts that another starts, what needs an artefact of yours (norms, parity), what writes
# files for others (bad_adapters, spoken_rows), and train.py: Sartor against its peers is `bench-peers`, a venv for each.
NOT_BENCHED := serve_sides serve_work learn_rows norms parity bad_adapters spoken_rows train
BENCHMARKS := $(filter-out $(NOT_BENCHED),$(basename $(notdir $(shell grep -l __main__ benchmarks/*.py))))
# where scripts keep what they made, so that a second run goes on from it
BENCH_OUT ?= bench-out
options_collaborate := --out $(BENCH_OUT)/collaborate
# a call of a benchmark ends after 60 minutes; `make bench` again goes on, and measures nothing twice of the same code
RECORD := env -u OPENBLAS_CORETYPE $(BIN)/python benchmarks/scoreboard/record.py

# one that fails is recorded with its reason, and the others are measured
bench: $(VENV)/.bench $(addprefix bench-,$(BENCHMARKS))  ## each benchmark's JSON and the scoreboard: hours
	$(MAKE) scoreboard

bench-%: $(VENV)/.bench
	-$(RECORD) benchmarks/$*.py --json --work $(BENCH_OUT)/$* $(options_$*)

scoreboard: $(VENV)/.dev  ## docs/development/scoreboard.md from benchmarks/results
	cd benchmarks && ../$(BIN)/python scoreboard/scoreboard.py

bench-small: $(VENV)/.dev  ## every benchmark at its smallest size, as CI runs it: minutes
	$(BIN)/python -m pytest -q -m "" tests/test_smallest_benchmarks.py

bench-peers: $(VENV)/.dev  ## several GB of venvs, and an hour
	$(RECORD) benchmarks/train.py --json --work $(BENCH_OUT)/train
	$(MAKE) scoreboard

docs: $(VENV)/.dev  ## every block of README and docs, run
	$(BIN)/python -m pytest -q -m "" tests/test_docs.py

site: $(VENV)/.site  ## the documentation site in site/, without a network: open site/index.html
	$(BIN)/python tools/site_build.py

clean:
	rm -rf $(VENV) $(VENV)-lock $(DEMO_OUT) $(BENCH_OUT) site
