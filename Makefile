# make test and make bench need nothing but python3: they set up .venv on the way. `make help` lists the rest.
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help test lint format bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

test: lint ## lint, then run every test and docstring example
	$(BIN)/pytest -q -n auto

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED) ## fix what can be fixed and format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(INSTALLED) ## measure speed and accuracy
	$(BIN)/mep bench

clean: ## remove .venv, caches and build products
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: a pinned version gives the CPU build, a range gives gigabytes of CUDA libraries.
.venv/.torch:
	python3 -m venv .venv
	$(PIP) install $(TORCH)
	touch $@

$(INSTALLED): pyproject.toml | .venv/.torch
	$(PIP) install --editable '.[dev]'
	touch $@
