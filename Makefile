# llmq's developer interface. On a fresh machine `make demo` and `make test` set up all they need in .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
PINS   := configs/constraints.txt
BUILD  := pyproject.toml $(PINS) $(wildcard kernels/CMakeLists.txt kernels/cpu/*)
TORCH  := $(shell sed -n 's/^\(torch==.*\)/\1/p' $(PINS))

# workers that are done take over tests that others have not come to
ALL_CORES := -n auto --dist worksteal

export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help
help:  ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: demo
demo: $(VENV)/.run  ## Set up, then compare the schemes on the bundled checkpoint
	@$(BIN)/llmq demo

.PHONY: test
test: $(VENV)/.dev  ## Set up, then run the whole suite on all cores
	@$(BIN)/python -m pytest $(ALL_CORES)

.PHONY: test-fast
test-fast: $(VENV)/.dev  ## The part of the suite that takes under a minute
	@$(BIN)/python -m pytest $(ALL_CORES) -m "not slow" -q

.PHONY: check
check: $(VENV)/.dev  ## Style, types, import floors, generated documents
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python scripts/docs.py --check

.PHONY: gate
gate: $(VENV)/.run  ## Judge the bundled model's quality and speed by the committed baseline (about a minute); reports in build/gate
	@$(BIN)/llmq --history off ci --out build/gate

.PHONY: style
style: $(VENV)/.dev  ## Mend what can be mended by itself
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

.PHONY: browser
browser:  ## Install Chromium through apt, for the tests of pages; without it they are skipped
	@if command -v chromium >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; then \
	  echo "Installed Chromium"; \
	else \
	  echo "NOTICE: no Chromium, and apt cannot install it here: the tests of pages will be skipped."; \
	fi

.PHONY: docs
docs: $(VENV)/.dev  ## Regenerate docs/cli.md and the tables made from records
	@$(BIN)/python scripts/docs.py

.PHONY: results
results: $(VENV)/.dev  ## Measure the README's tables anew (about ten minutes on two cores), then regenerate them
	@$(BIN)/python scripts/measure_results.py && $(BIN)/python scripts/docs.py

.PHONY: clean
clean:  ## Remove the environment and what was built
	rm -rf $(VENV) build dist

# torch by itself and first, so that the pinned build is the one that everything after it finds
$(VENV)/.torch: $(PINS)
	@command -v $(PYTHON) >/dev/null || { echo "llmq needs Python 3.11 or newer; set PYTHON=... to name it." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "llmq needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); set PYTHON=... to name another." >&2; exit 1; }
	@echo "Setting up $(VENV): $(TORCH) first, then the rest (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.run: $(VENV)/.torch $(BUILD)
	@if command -v "$${CXX:-c++}" >/dev/null 2>&1; then \
	  echo "Installing llmq, and compiling its native kernels with $${CXX:-c++}"; \
	  $(PIP) install -c $(PINS) -e .; \
	else \
	  echo "NOTICE: no C++ compiler found ($${CXX:-c++}): llmq works without its native CPU kernels, and slower."; \
	  echo "        Install one (Debian: apt install g++) and run make again; 'llmq env' says what is missing."; \
	  $(PIP) install -c $(PINS) -e . -C wheel.cmake=false; \
	fi
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "Installing what the tests and checks need"
	@$(PIP) install -c $(PINS) $$($(BIN)/python scripts/dev_requirements.py)
	@touch $@
