# Everything a developer or a curious operator needs; python3 (3.11 or later, with venv) is enough.
.DEFAULT_GOAL := help

VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
BENCH  := $(VENV)/.installed-bench
PIP    := $(PYTHON) -m pip install -qq --no-cache-dir --disable-pip-version-check

# Compiled files and caches belong into .venv, so that the checkout stays as it was.
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## Create .venv with what lint, test and demo need

# Under a lock, because two of these commands may be started at the same moment.
$(STAMP): requirements.txt requirements-dev.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "python3 is older than 3.11: $$(python3 --version)" >&2; exit 2; }
	@python3 -c 'import venv, ensurepip' || \
	    { echo "python3 lacks venv; on Debian: apt-get install python3-venv" >&2; exit 2; }
	@mkdir -p $(VENV)
	@python3 tests/with_lock.py $(VENV)/.lock sh -ec \
	    'test $@ -nt requirements.txt -a $@ -nt requirements-dev.txt && exit 0; \
	     test -x $(PYTHON) || python3 -m venv $(VENV); $(PIP) -r requirements-dev.txt; touch $@'

$(BENCH): $(STAMP) bench/requirements.txt
	@$(PIP) -r bench/requirements.txt
	@touch $@

.PHONY: test
test: $(STAMP) ## Run the tests on embedded PostgreSQLs, three runs at once (K=word to pick some)
	@$(PYTHON) tests/run.py $(if $(K),-k "$(K)")

.PHONY: test-browser
test-browser: $(STAMP) ## Look at the pages with Chromium, if there is one
	@$(PYTHON) -m pytest -q tests/browser_pages.py

.PHONY: lint
lint: $(STAMP) ## Check the code with ruff
	@$(VENV)/bin/ruff check .

.PHONY: demo
demo: $(STAMP) ## Run an alarm calculation end to end on a made-up park
	@$(PYTHON) examples/demo.py

.PHONY: demo-bazefield
demo-bazefield: $(STAMP) ## Run both Bazefield jobs against a stand-in server
	@$(PYTHON) examples/demo_bazefield.py

.PHONY: chaos
chaos: $(STAMP) ## Kill, cut off, crash; all orders; random alarms: what was lost (P="silent pool")
	@$(PYTHON) tests/chaos.py $(P)
	@$(PYTHON) tests/scenes.py
	@$(PYTHON) tests/alarm_chaos.py

.PHONY: mutants
mutants: $(STAMP) ## Leave out one clause after the other; see the tests notice each
	@$(PYTHON) tests/mutants.py

.PHONY: bench
bench: $(BENCH) ## Measure beside the alternatives (P="steps alarms" to pick parts)
	@$(PYTHON) bench/bench.py $(P)

.PHONY: clean
clean: ## Remove .venv and what the tools left
	rm -rf $(VENV) bench/results
	find . -name __pycache__ -prune -exec rm -rf {} +
