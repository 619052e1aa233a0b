# Every target sets itself up: a virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: help demo test test-all release bench bench-store clean

help:
	@echo "make demo      train CrevNet on a synthetic city, score it, draw its predictions (minutes, on two CPU cores)"
	@echo "make test      ruff, mypy and the tests"
	@echo "make test-all  the same, with the slow tests"
	@echo "make release   build the sdist and the wheel into dist/, install each elsewhere and use it there (minutes)"
	@echo "make bench     time the engine's hot paths against ordinary autograd, and fail if one is slower than was stored"
	@echo "make bench-store  the same, and store the ratios instead"
	@echo "make clean     remove .venv, dist/ and the demo's folder"

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

release: .venv/.ready
	$(BIN)/pytest tests/release

# Three processes, since they differ by more than the rounds within one.
bench bench-store: .venv/.ready
	@mkdir -p .benchmarks
	@for run in 1 2 3; do \
	  OMP_NUM_THREADS=1 $(BIN)/pytest -q bench/test_hot_paths.py --benchmark-enable --benchmark-quiet \
	    --benchmark-json .benchmarks/hot-paths-$$run.json || exit 1; \
	done
	@$(BIN)/python bench/regressions.py .benchmarks/hot-paths-[123].json $(if $(filter bench-store,$@),--store)

clean:
	rm -rf .venv dist $(DEMO)
