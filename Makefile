# make demo: everything from an empty folder to figures.   make test: the tests.   Both create .venv if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a process: tests start several at once, and OpenMP threads that wait for a core burn another one.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup demo demo-dense test test-faults reproduce lint format clean

setup: $(INSTALLED)

$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --quiet -r requirements.txt -e '.[dev]'
	$(BIN)/python -c 'from dino_xcit.augment import MultiCropAugmentation; MultiCropAugmentation().compile()'  # cached
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python benchmarks/demo.py

# Segmentation, detection and fine-tuning of a small XCiT pretrained on scenes: at most 15 minutes on 2 CPU cores.
demo-dense: $(INSTALLED)
	$(BIN)/python benchmarks/demo_dense.py

test: $(INSTALLED)
	$(PYTEST) -m 'not slow'

# All of them, those that kill and damage things included.
test-faults: $(INSTALLED)
	$(PYTEST)

# Are a published file's figures what was published?   make reproduce DATA=/imagenet WEIGHTS=FILE [LINEAR=FILE] [FLAGS='...']
reproduce:
	@test -n "$(DATA)" -a -n "$(WEIGHTS)" || { echo "expected DATA, ImageNet's folder, and WEIGHTS, a published file: make reproduce DATA=/imagenet WEIGHTS=dino_xcit_small_12_p16_pretrain.pth (docs/reproduce.md)" >&2; exit 2; }
	@$(MAKE) --no-print-directory $(INSTALLED)
	$(BIN)/python -m eval.reproduce --data-path "$(DATA)" --weights "$(WEIGHTS)" $(if $(LINEAR),--linear "$(LINEAR)") $(FLAGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
