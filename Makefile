# make demo    a virtual environment, the main job on a generated almanac, the path of its report
# make test    a virtual environment, the tests
# make heavy   the tests of kills and sweeps on clusters of several nodes, a quarter of an hour
# make check   lint, then test
#
# PYTHON=python3.12 picks the interpreter of a new environment. TORCH_FLAGS reaches the installation of torch alone: an
# index of CPU builds, say, is a far smaller download for a machine without a GPU.

PYTHON ?= python3
VENV ?= .venv
TORCH_FLAGS ?=
OVERRIDES ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
RUN := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-test

.PHONY: demo test heavy check lint clean
.DELETE_ON_ERROR:

demo: $(RUN)
	$(BIN)/python -m pipelines demo $(OVERRIDES)

test: $(DEVELOP)
	$(BIN)/python -m pytest

heavy: $(DEVELOP)
	$(BIN)/python -m pytest -m heavy

check: lint test

lint: $(DEVELOP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_layers.py
	$(BIN)/pyright --pythonpath $(BIN)/python

# torch comes first: deepspeed looks for it while it is built.
$(RUN): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_FLAGS) torch==2.13.0
	$(PIP) --editable .
	touch $@

# kronfluence asks for torchvision, which it does not need here and which must match the build of torch.
$(DEVELOP): $(RUN)
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps kronfluence einconv opt_einsum einops
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist
