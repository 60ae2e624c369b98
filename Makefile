# make demo   train a small diffusion model on real digits and draw samples (2 to 3 minutes on 2 CPU cores)
# make test   run the whole test suite
# make wheel  build the sdist and the wheel, and run the tests against the wheel in an environment of its own
# Both set up everything they need in .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test bench wheel lint clean

demo: $(VENV)/.demo
	@echo "== fastdiff demo: training on real handwritten digits, then sampling"
	$(BIN)/fastdiff demo $(ARGS)

test: $(VENV)/.dev
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== tests"
	$(BIN)/python -m pytest -q -n auto $(ARGS)

bench: $(VENV)/.dev
	@echo "== benchmarks"
	$(BIN)/python -m pytest benchmarks $(ARGS)

# The sdist, the wheel made of it, and the tests against that wheel in an environment of its own.
wheel: $(VENV)/.dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet -c constraints.txt torch
	build/wheel/bin/pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[test]"
	cp -r tests build/wheel/tests
	cd build/wheel && bin/python -m pytest -q -n auto -p no:cacheprovider tests

lint: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch goes first and pinned: a looser request may fetch gigabytes of another build.
$(VENV)/.torch: constraints.txt
	@echo "== setting up $(VENV): PyTorch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	touch $@

SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	@echo "== setting up $(VENV): fastdiff and what the demo needs"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	@echo "== setting up $(VENV): fastdiff and what development needs"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
