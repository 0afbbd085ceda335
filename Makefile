# `make demo` and `make test` prepare an environment of their own in .venv; `make gpu` uses the Python
# that is there, with its torch and triton, and needs no network.
PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: demo test gate gpu lint clean

demo: $(STAMP)
	$(VENV)/bin/python -m perf demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(WORKERS)

gate: $(STAMP)
	$(VENV)/bin/python -m perf lowering --all --gate
	$(VENV)/bin/python -m perf traffic --gate

gpu:
	PYTHONPATH=. $(PYTHON) -m perf gpu

lint: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

clean:
	rm -rf $(VENV) build *.egg-info

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
