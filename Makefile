# make test and make bench need nothing but python3: they set up .venv on the way. `make help` lists the rest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help test test-all lint format bench baselines mutants clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

test: lint ## lint, then run the tests and docstring examples; of long tables of cases a part
	$(BIN)/pytest -q -n auto --dist worksteal

test-all: lint ## as test, with all cases and all random models
	MEP_TEST_ALL=1 $(BIN)/pytest -q -n auto --dist worksteal

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## fix what can be fixed and format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(INSTALLED) ## measure speed and accuracy
	$(BIN)/mep bench

# Measured outside of what git tracks, so that every record names the same clean commit; copied at the end.
MNIST ?= $(wildcard data/mnist)
MEASURED := runs/baselines
PAGE := docs/benchmarks
VARIANTS := --add "eqprop tol=0.1" --add "eqprop tol=0.001" --add "eqprop beta=0.1" --add "eqprop beta=0.5" \
	--add "eqprop tol=0.001 beta=0.1" --add "eqprop settle_lr=0.15" --add "smep tol=0.1" --add "smep beta=0.1"

baselines: $(INSTALLED) ## measure the tables of docs/benchmarks; full MNIST from data/mnist or MNIST=folder
	rm -rf $(MEASURED)
	$(BIN)/mep bench --out $(MEASURED)
	$(if $(MNIST),$(BIN)/mep bench --data mnist --folder $(MNIST) --seeds 1 --out $(MEASURED))
	$(BIN)/mep bench --name tolerance --seconds 5 --only sgd --only eqprop --only smep --only smep_fast \
		$(VARIANTS) --out $(MEASURED)
	$(BIN)/mep profile --name profile --out $(MEASURED)
	$(BIN)/mep study --out $(MEASURED)
	$(BIN)/mep bench speed --out $(MEASURED)
	rm -f $(PAGE)/*.json $(PAGE)/*.png
	cp $(MEASURED)/*.json $(MEASURED)/*.png $(PAGE)
	cd $(PAGE) && { cat introduction.md && ../../$(BIN)/mep report mnist5k.json $(if $(MNIST),mnist.json) \
		tolerance.json profile.json study.json; } > PERFORMANCE_BASELINES.md
	cd $(PAGE) && { cat speed_introduction.md && ../../$(BIN)/mep report speed.json; } > speed.md

SAMPLE ?= 40
SEED ?= 0

mutants: $(INSTALLED) ## change the core in SAMPLE places, one at a time, and list what no test notices
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutate.py --sample $(SAMPLE) --seed $(SEED)

clean: ## remove .venv, caches and build products
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: a pinned version gives the CPU build, a range gives gigabytes of CUDA libraries. It is
# named again with the rest, lest one of these bring another.
.venv/.torch:
	python3 -m venv .venv
	$(PIP) install $(TORCH)
	touch $@

$(INSTALLED): pyproject.toml | .venv/.torch
	$(PIP) install $(TORCH) --editable '.[dev]'
	touch $@
