# make demo       train a small diffusion model on real digits and draw samples (2 to 3 minutes on 2 CPU cores)
# make test       run the whole test suite
# make mutants    plant faults and say which no test notices (ARGS="--count 200 --seed 1"; CONTRIBUTING.md has the rest)
# make test-pure  the tests without the C++ extension
# make nightly    everything: all cases, without the extension and from a wheel too, and 200 faults of each group for the
#                 day's seed
# make bench      the operations against eager PyTorch, torch.compile and diffusers (2 minutes; ARGS="--preset full": 5)
# make sanitize   the native backend's tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make docs       the documents as a site, with the API reference, in build/site
# make wheel      the sdist and the wheel, and the tests against the wheel in an environment of its own
# They set up everything they need in .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
TODAY := $(shell date +%Y%m%d)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo docs test mutants test-pure nightly bench sanitize wheel lint clean

demo: $(VENV)/.demo
	@echo "== fastdiff demo: training on real handwritten digits, then sampling"
	$(BIN)/fastdiff demo $(ARGS)

test: $(VENV)/.dev
	@echo "== lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== tests"
	$(BIN)/python -m pytest -q -n auto $(ARGS)

mutants: $(VENV)/.dev
	$(BIN)/python tests/mutants $(ARGS)

test-pure: $(VENV)/.dev
	FASTDIFF_BUILD=0 $(BIN)/python -m pytest -q -n auto -p no:cacheprovider $(ARGS)

nightly: export FASTDIFF_NIGHTLY = 1
nightly: test test-pure wheel
	@echo "== planted faults: the seed is $(TODAY)"
	$(BIN)/python tests/mutants --record
	$(BIN)/python tests/mutants --count 200 --seed $(TODAY) --control

# The documents as a site, in build/site. In build/pages they lie as they do here; the first page gets the contents.
TRAINERS := index sd_scripts musubi_tuner onetrainer simpletuner ai_toolkit diffusion_pipe robot_policies finetrainers \
  diffsynth stable_audio_tools diffusers dit_sit edm flow_matching
PAGES := objectives recipes data video distributed migrating $(TRAINERS:%=trainers/%) diffusers samplers guidance likelihood \
  autoencoder moments features reference results performance design

docs: $(VENV)/.dev
	rm -rf build/pages build/site
	mkdir -p build/pages/benchmarks
	cp -r README.md CONTRIBUTING.md CHANGELOG.md docs examples build/pages
	cp -r benchmarks/results build/pages/benchmarks
	printf '\n```{toctree}\n:hidden:\n\n%s\n```\n' "$$(printf '%s\n' $(PAGES:%=docs/%) CONTRIBUTING CHANGELOG)" \
	  >>build/pages/README.md
	$(BIN)/sphinx-build -q -W --keep-going -c docs build/pages build/site
	@echo "== build/site/README.html"

bench: $(VENV)/.dev
	@echo "== the cases under pytest-benchmark"
	$(BIN)/python -m pytest benchmarks -q
	@echo "== fastdiff bench"
	$(BIN)/fastdiff bench $(ARGS)

# The sdist, the wheel made of it, and the tests against that wheel in an environment of its own, with everything beside
# them but the package.
wheel: $(VENV)/.dev
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet -c constraints.txt torch
	build/wheel/bin/pip install --quiet -c constraints.txt "$$(ls dist/*.whl)[test]"
	build/wheel/bin/pip install --quiet --no-deps -c constraints.txt -r tests/upstream.txt
	mkdir build/wheel/tree
	cp -r .ci $(filter-out build dist fastdiff $(VENV),$(wildcard *)) build/wheel/tree
	cd build/wheel/tree && ../bin/python -m pytest -q -n auto -p no:cacheprovider $(ARGS)

# In a copy of the package with its own build of the extension: the one in the tree stays as it is. Python is not built
# with the sanitizers, so they are loaded before it. It and torch leave memory to the system when they end: no leaks.
# Captured by pytest, a report would be lost with the process: only sys is captured.
SANITIZED := $(abspath build/sanitize)
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)

sanitize: $(VENV)/.dev
	@echo "== building with the sanitizers"
	mkdir -p $(SANITIZED)
	rm -rf $(SANITIZED)/fastdiff
	cp -r fastdiff $(SANITIZED)/fastdiff
	rm -f $(SANITIZED)/fastdiff/_C.*
	PATH=$(abspath $(BIN)):$$PATH cmake -S . -B $(SANITIZED)/build -G Ninja -DFASTDIFF_SANITIZE=ON \
	  -DCMAKE_CXX_COMPILER=$(CXX) -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(SANITIZED)/fastdiff
	PATH=$(abspath $(BIN)):$$PATH cmake --build $(SANITIZED)/build
	@echo "== the native backend's tests"
	cd $(SANITIZED) && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	  UBSAN_OPTIONS=print_stacktrace=1 $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider --capture=sys -k "native or fast_calls or torch_noise" \
	  $(addprefix $(CURDIR)/tests/,ops math/test_philox.py backends/test_native.py test_torch_randn.py) $(ARGS)

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

$(VENV)/.dev: $(VENV)/.torch $(SOURCES) tests/upstream.txt
	@echo "== setting up $(VENV): fastdiff and what development needs"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt -r tests/upstream.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
