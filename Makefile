# make demo   from a bare clone to a cited answer: .venv, the default weights, an index of data/sample, a question
# make test   the same set-up, then the whole test suite        make lint   ruff, import layers, types, links
# make docs   the website of docs/ in build/docs, strictly
# PYTHON=/path/to/python3.12 chooses the interpreter, QUESTION='...' the demo's question.

.PHONY: demo test lint docs setup bench-setup clean
.DELETE_ON_ERROR:

# The first interpreter of 3.11-3.13 that truly runs (a pyenv shim may not) and can make virtual environments.
ifndef PYTHON
PYTHON := $(shell for name in python3 python3.13 python3.12 python3.11 python; do \
	$$name -c 'import sys, venv, ensurepip; (3, 11) <= sys.version_info < (3, 14) or sys.exit(1); \
	print(sys.executable)' 2>/dev/null && break; done)
endif
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet

export QUESTION ?= What caused the decline of the wandering albatrosses of Fenwick Bay?

demo: .venv/.installed
	$(PY) scripts/ingest.py corpus.path=data/sample/documents index.path=.demo/index
	$(PY) scripts/generate.py index.path=.demo/index "question=$$QUESTION"
	@echo
	@echo "Your own folder:  $(PY) scripts/ingest.py corpus.path=DIR index.path=INDEX"
	@echo "Your questions:   $(PY) scripts/generate.py index.path=INDEX"
	@echo "A better reader:  add generator.weights=FILE.gguf, or =ollama:NAME, to that command"

test: .venv/.installed-dev
	$(PY) -m pytest --numprocesses=auto --dist=loadfile $(ARGS)

lint: .venv/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/mypy
	$(PY) -m tests.docs.links

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "-> build/docs/index.html"

setup: .venv/.installed-dev

bench-setup: .venv/.installed-bench

clean:
	rm -rf .venv .demo outputs multirun build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is made once, and again only if it is broken; packages follow the requirements' files.
.venv/.installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 was found: try make PYTHON=/path/to/python"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "Installing requirements.txt into .venv (the first time takes a minute or two)"
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	@echo "Installing requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt
	@touch $@

.venv/.installed-docs: .venv/.installed requirements-docs.txt
	@echo "Installing requirements-docs.txt"
	@$(PIP) -r requirements-docs.txt
	@touch $@

.venv/.installed-bench: .venv/.installed requirements-bench.txt
	@echo "Installing requirements-bench.txt (llama-cpp-python is compiled: about ten minutes)"
	@$(PIP) -r requirements-bench.txt
	@touch $@
