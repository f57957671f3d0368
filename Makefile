# Everything sets itself up: a virtual environment in .venv, from the package registry and nothing else.
PYTHON ?= python3
BIN = .venv/bin
JOBS ?= 2
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.lock


.PHONY: demo studio speech serve test test-slow lint bench soak clean

demo: .venv/demo
	$(BIN)/plait demo -o runs/demo

serve: .venv/serve
	$(BIN)/plait serve runs/demo --ui

studio: .venv/serve
	$(BIN)/plait studio runs/studio

test: .venv/dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.venv/demo: pyproject.toml constraints.lock
	$(PYTHON) -c 'import sys; sys.exit("Plait needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) "$$(grep -x 'torch==[0-9.]*' constraints.lock)"
	$(INSTALL) -e ".[tensorboard]"
	$(MAKE) -s speech || echo "No speech synthesis here: the demo goes on with text and images."
	@touch $@

speech:
	$(INSTALL) --force-reinstall --no-deps espeakng-loader

.venv/serve: .venv/demo
	$(INSTALL) -e ".[studio]"
	@touch $@

.venv/dev: .venv/demo
	$(INSTALL) -e ".[dev]"
	@touch $@

docs: .venv/docs
	$(BIN)/python docs/make.py
	$(BIN)/python -m mkdocs build --strict

.venv/docs: .venv/dev
	$(INSTALL) -e ".[docs]"
	@touch $@

bench: .venv/dev
	$(BIN)/python bench/run.py

soak: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak_tune.py runs/soak_tune
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak_serving.py --model runs/demo
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak_processes.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak_search.py --model runs/demo

clean:
	rm -rf .venv runs site
