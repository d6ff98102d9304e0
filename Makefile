# Two commands matter: `make demo` sets up and runs the whole line, `make test` sets up and passes the suite.
VENV   ?= .venv
PYTHON ?= python3.11
BIN    := $(VENV)/bin

.PHONY: demo test check setup lock clean

demo: setup
	$(BIN)/foreframe demo

test: setup check
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.lock pyproject.toml infra/setup.sh
	PYTHON=$(PYTHON) infra/setup.sh $(VENV)

# The lock holds versions only: no index, no address. `tests/contract/test_lock.py` reads it.
lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links -o requirements.lock

clean:
	rm -rf $(VENV) runs
