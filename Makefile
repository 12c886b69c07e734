# make serve        serve the bundled model on http://127.0.0.1:8000 (HOST=... PORT=... ARGS="--flag ...")
# make test         run the tests (ARGS="-k name"; EXTRAS=dev,train also runs those that need sae-lens)
# make check        formatting, lint, types
#
# Each makes its own virtual environment in .venv on first use. On Linux, PyPI's torch comes with CUDA; where there is
# no GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the far smaller CPU build.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
EXTRAS ?= dev
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
comma := ,
INSTALL := $(BIN)/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed
STAMP_EXTRAS := $(STAMP)-$(subst $(comma),-,$(EXTRAS))

.PHONY: serve test check clean

serve: $(STAMP)
	@exec $(BIN)/steerserve serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(STAMP_EXTRAS)
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP_EXTRAS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "steerserve needs Python 3.11 or newer; name one with: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than the files that say what to install, so the second call has nothing to do.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing steerserve into $(VENV) (a few minutes the first time)"
	$(INSTALL) --editable .
	@touch $@

$(STAMP_EXTRAS): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing steerserve[$(EXTRAS)] into $(VENV) (a few minutes the first time)"
	$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $(STAMP) $@
