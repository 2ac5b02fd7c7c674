# Both main targets work on a fresh machine: they create .venv, install what is pinned, and run.
#   make demo   fine-tune MiniLM on movie reviews, exact and sampled side by side
#   make test   the test suite, and a wheel built, installed and imported elsewhere
# make test-all also runs what takes long, make fuzz 200 random networks, make soak thousands of steps.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all test-fast fuzz soak lint wheel-check clean

$(INSTALLED): pyproject.toml constraints.txt requirements-demo.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=24"
	$(BIN)/pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[hf,plot,demo,dev]"
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements-demo.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/wtacrs-fx demo

test: $(INSTALLED) wheel-check
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15 -m "not long"

test-all: $(INSTALLED) wheel-check
	$(BIN)/python -m pytest -n 2 --dist worksteal

fuzz: $(INSTALLED)
	FUZZ_NETWORKS=200 $(BIN)/python -m pytest -s tests/test_fuzz.py

soak: $(INSTALLED)
	$(BIN)/python -m wtacrs_fx.benchmarks.soak

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not long"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && $(BIN)/pip install --quiet --no-deps --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy

# The wheel must stand alone: built from this tree, installed in a clean venv, imported from another directory.
wheel-check: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . > /dev/null
	$(BIN)/python tests/check_wheel.py dist constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
