PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# uv ignores pip's settings; carry a local wheel folder over where the machine has one.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
# Small tensors on few cores: OpenMP barriers cost more than they save.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint bench lock

demo: $(VENV)/.ok
	$(BIN)/orthomerge demo --out demo-output --overwrite

test: $(VENV)/.ok lint
	$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.ok
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .mypy_cache/packages && ln -sfn ../../cli .mypy_cache/packages/orthomerge_cli
	$(BIN)/mypy

bench: $(VENV)/.ok
	$(BIN)/python benchmarks/merge_speed.py

# pins.txt holds torch where the tested version is older than the newest release.
lock: $(VENV)/.ok
	$(BIN)/uv pip compile -q -c pins.txt --all-extras --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --python-version 3.11 pyproject.toml | sed 's/+cpu//' > constraints.txt

$(VENV)/.ok: pyproject.toml constraints.txt
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv==0.13.9
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@
