# Every target sets itself up: a virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: help demo test test-all clean

help:
	@echo "make demo      train CrevNet on a synthetic city, score it, draw its predictions (minutes, on two CPU cores)"
	@echo "make test      ruff, mypy and the tests"
	@echo "make test-all  the same, with the slow tests"
	@echo "make clean     remove .venv and the demo's folder"

.venv/.ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[crevnet,bench,dev]'
	@touch $@

demo: .venv/.ready
	$(BIN)/crevnet data synth $(DEMO)/data --city.height 128 --city.width 112 --city.training_days 6
	rm -rf $(DEMO)/run
	$(BIN)/crevnet fit --config configs/demo.yaml --data.root $(DEMO)/data --out $(DEMO)/run
	$(BIN)/crevnet evaluate $(DEMO)/run --json $(DEMO)/scores.json
	$(BIN)/crevnet predict $(DEMO)/run --out $(DEMO)
	@echo "The scores are in $(DEMO)/scores.json; the pictures, predictions beside the truth, are above: open the PNG and the GIF."

test: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow"

test-all: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf .venv $(DEMO)
