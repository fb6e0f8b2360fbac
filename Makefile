# Everything is plain pip and python; each target needs only make and Python 3.10 or newer.
PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= output/demo
BENCH ?= output/bench
BIN := $(VENV)/bin
PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
EDITABLE := -e .[dev] $(foreach folder,$(PLUGINS),-e ./$(folder:%/=%))
STAMP := $(VENV)/installed

.PHONY: install demo test test-all lint types docs bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(foreach folder,$(PLUGINS),$(folder)pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(EDITABLE)
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m trainer_wan.testing scenes datasets/demo
	$(BIN)/python -m trainer_wan.testing scenes datasets/demo-known --shape known --n 36
	$(BIN)/python -m trainer_wan.testing scenes datasets/demo-eval --n 4 --seed 1000
	$(BIN)/trainer run --config config/demo/config.json --plugins wan --output_dir $(OUTPUT)
	$(BIN)/python -m trainer_wan.testing judge $(OUTPUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not gpu"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m trainer_core.reference docs/reference

bench: $(STAMP)
	$(BIN)/python tests/bench/core.py $(BENCH)
	$(BIN)/python tests/bench/data.py $(BENCH)

clean:
	rm -rf output cache
