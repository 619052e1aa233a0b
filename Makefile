# Every target but `gpu` sets itself up: a virtual environment in .venv, made once.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: help demo test test-all fuzz docs release bench bench-store gpu experiment clean

help:
	@echo "make demo      train CrevNet on a synthetic city, score it, draw its predictions (minutes, on two CPU cores)"
	@echo "make test      ruff, mypy, the documentation's site and the tests"
	@echo "make test-all  the same, with the slow tests"
	@echo "make fuzz      read 20,000 mutated files of every sort, from seed SEED on (minutes)"
	@echo "make docs      build the documentation's site: open site/index.html"
	@echo "make release   build the sdist and the wheel into dist/, install each elsewhere and use it there (minutes)"
	@echo "make bench     time the engine's hot paths against ordinary autograd, and fail if one is slower than was stored"
	@echo "make bench-store  the same, and store the ratios instead"
	@echo "make gpu       measure memory, batches, exactness and times on a CUDA GPU (nine minutes; PYTHON as it is, OUT=folder)"
	@echo "make experiment   train CrevNet by the paper's recipe, and other models beside it (two hours on two cores; goes on where it stopped)"
	@echo "make clean     remove .venv, dist/, the site and the demo's folder"

.venv/.ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[crevnet,bench,examples,dev,docs]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps memcnn==1.5.2  # it asks for torchvision, and needs it not
	@touch $@

demo: .venv/.ready
	$(BIN)/crevnet data synth $(DEMO)/data --city.height 128 --city.width 112 --city.training_days 6
	rm -rf $(DEMO)/run
	$(BIN)/crevnet fit --config configs/demo.yaml --data.root $(DEMO)/data --out $(DEMO)/run
	$(BIN)/crevnet evaluate $(DEMO)/run --json $(DEMO)/scores.json
	$(BIN)/crevnet predict $(DEMO)/run --out $(DEMO)
	@echo "The scores are in $(DEMO)/scores.json; the pictures, predictions beside the truth, are above: open the PNG and the GIF."

test: .venv/.ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow"

test-all: .venv/.ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# From another seed each time: the tests read those from 0 on.
SEED ?= $(shell date +%s)
fuzz: .venv/.ready
	CREVNET_FUZZ=20000 CREVNET_FUZZ_SEED=$(SEED) $(BIN)/pytest -q -s tests/crevnet/data/test_fuzz.py

docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

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

# In no environment of its own: a GPU machine has a PyTorch that fits its driver.
OUT ?= bench/results/gpu
gpu:
	PYTHONPATH=.:models $(PYTHON) bench/gpu.py --out "$(OUT)"

# One thread each, so that two cores train side by side; stopped at any point, it goes on. SEEDS=3 trains with three.
SEEDS ?= 1
experiment: .venv/.ready
	@$(MAKE) --jobs 2 experiment-cities experiment-air-traffic

experiment-%: .venv/.ready
	@$(BIN)/python bench/experiment.py $* --seeds $(SEEDS)

clean:
	rm -rf .venv dist site $(DEMO)
