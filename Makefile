# make                  train on the bundled digits, write three grids of digits, say where everything is
# make test             run the tests
# make test-processors  run those that depend on rounding again, as on two other kinds of processor
# Each sets up .venv first, once. With another Python: make PYTHON=python3.12

PYTHON ?= python3
RUN := .venv/bin/python
NAME := quickstart
CODE := $(wildcard *.py data/*.py metrics/*.py utils/*.py)
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

all: models/$(NAME)/trained
	$(RUN) generate.py --model models/$(NAME)/best.pt --input test --filename $(NAME)-reconstructed --overwrite
	$(RUN) generate.py --model models/$(NAME)/best.pt --input random --filename $(NAME)-random --overwrite
	$(RUN) generate.py --input prior --filename digits --overwrite
	@echo
	@echo "The model:             models/$(NAME)/best.pt"
	@echo "Reconstructed digits:  generatedImages/$(NAME)-reconstructed.png"
	@echo "Decoded noise:         generatedImages/$(NAME)-random.png"
	@echo "New digits:            generatedImages/digits.png"
	@echo "The logs:              logs/$(NAME)"
	@echo "To look at the logs:   .venv/bin/tensorboard --logdir logs, then open http://localhost:6006"

# A name of its own, so that no run trained by hand is replaced. docs/results.md has the figures of these flags.
models/$(NAME)/trained: $(CODE) | .venv/ready
	$(RUN) VQ-VAE.py --dataset MNIST-10k --batch-size 32 --lr 4e-3 --beta 0.25 --output-folder $(NAME) --overwrite
	@touch $@

test: .venv/ready-dev
	$(PYTEST)

# torch, oneDNN and MKL are limited to older vector instructions. AVX2 is what make test uses where there is no AVX-512.
# Compiled steps are cached without regard to these limits: what was compiled for AVX-512 crashes or computes nonsense.
test-processors: .venv/ready-dev
	TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d) ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MKL_CBWR=COMPATIBLE \
		$(PYTEST) -m rounding
	! grep -qs avx512 /proc/cpuinfo || \
		TORCHINDUCTOR_CACHE_DIR=$$(mktemp -d) ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 $(PYTEST) -m rounding

# Touched last, so that an interrupted installation starts again.
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "Setting up .venv: torch is large, this takes a few minutes."
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt requirements-export.txt benchmarks/requirements.txt .venv/ready
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

.PHONY: all test test-processors
