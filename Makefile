# Every target except `gpu` creates the virtual environment .venv, if it does not exist yet.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: help demo test test-all fuzz docs release bench bench-store gpu experiment clean

help:
	@echo "make demo         train CrevNet on a synthetic city, score it and draw its predictions (minutes on two CPU cores)"
	@echo "make test         run ruff and mypy, build the documentation site, and run the tests except the slow ones"
	@echo "make test-all     the same, with the slow tests"
	@echo "make fuzz         read 20,000 mutated files of every kind, starting at seed SEED (minutes)"
	@echo "make docs         build the documentation site: open site/index.html"
	@echo "make release      build the sdist and the wheel into dist/, and test each in an environment of its own (minutes)"
	@echo "make bench        time the engine's hot paths relative to standard autograd; fail if one is slower than its stored ratio"
	@echo "make bench-store  time the same paths and store the ratios"
	@echo "make gpu          measure memory, batches, exactness and times on a CUDA GPU (nine minutes; uses PYTHON without .venv; OUT=folder)"
	@echo "make experiment   train CrevNet by the paper's recipe, and other models (two hours on two cores; resumes if stopped)"
	@echo "make clean        remove .venv, dist/, the site and the demo's folder"

.venv/.ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[crevnet,bench,examples,dev,docs]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps memcnn==1.5.2  # declares torchvision but does not use it
	@touch $@

demo: .venv/.ready
	$(BIN)/crevnet data synth $(DEMO)/data --city.height 128 --city.width 112 --city.training_days 6
	rm -rf $(DEMO)/run
	$(BIN)/crevnet fit --config configs/demo.yaml --data.root $(DEMO)/data --out $(DEMO)/run
	$(BIN)/crevnet evaluate $(DEMO)/run --json $(DEMO)/scores.json
	$(BIN)/crevnet predict $(DEMO)/run --out $(DEMO)
	@echo "Scores: $(DEMO)/scores.json. Predictions next to the truth: the PNG and the GIF named above."

# One process per core. A file's tests stay in one process, because they share what is expensive to make.
PARALLEL := --numprocesses auto --dist loadfile
test: .venv/.ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow" $(PARALLEL)

test-all: .venv/.ready docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL)

# A different seed each time. The tests use the seeds from 0 on.
SEED ?= $(shell date +%s)
fuzz: .venv/.ready
	CREVNET_FUZZ=20000 CREVNET_FUZZ_SEED=$(SEED) $(BIN)/pytest -q -s tests/crevnet/data/test_fuzz.py

docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

release: .venv/.ready
	$(BIN)/pytest tests/release

# Three processes, because times vary more between processes than between the rounds of one.
bench bench-store: .venv/.ready
	@mkdir -p .benchmarks
	@for run in 1 2 3; do \
	  OMP_NUM_THREADS=1 $(BIN)/pytest -q bench/test_hot_paths.py --benchmark-enable --benchmark-quiet \
	    --benchmark-json .benchmarks/hot-paths-$$run.json || exit 1; \
	done
	@$(BIN)/python bench/regressions.py .benchmarks/hot-paths-[123].json $(if $(filter bench-store,$@),--store)

# Without .venv: the PyTorch of a GPU machine matches its driver.
OUT ?= bench/results/gpu
gpu:
	PYTHONPATH=.:models $(PYTHON) bench/gpu.py --out "$(OUT)"

# One thread per process, so that two cores train in parallel. A stopped experiment resumes. SEEDS=3 trains with three seeds.
SEEDS ?= 1
experiment: .venv/.ready
	@$(MAKE) --jobs 2 experiment-cities experiment-air-traffic

experiment-%: .venv/.ready
	@$(BIN)/python bench/experiment.py $* --seeds $(SEEDS)

clean:
	rm -rf .venv dist site $(DEMO)
