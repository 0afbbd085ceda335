# `make demo` and `make test` prepare an environment of their own in .venv; `make gpu` uses the Python
# that is there, with its torch and triton, and needs no network. With TRITON=3.6.0 `make gate` and `make
# test` use that Triton, in an environment of its own.
PYTHON ?= python3
WORKERS ?= auto
TRITON ?=
VENV := .venv$(TRITON:%=-triton-%)
STAMP := $(VENV)/installed

# What of the tests runs compiled kernels in the emulator, and for which GPU they are compiled.
TARGET ?= sm_90
EMULATED := $(addprefix tests/test_,rows.py row_bits.py channels.py channel_evaluation.py weights.py \
	team.py long_rows.py replay.py stages.py)

.PHONY: demo test emulate gate gpu lint clean

demo: $(STAMP)
	$(VENV)/bin/python -m perf demo

test: $(STAMP)
	$(VENV)/bin/python -m pytest -n $(WORKERS)

emulate: $(STAMP)
	TRITONNORM_EMULATE=$(TARGET) $(VENV)/bin/python -m pytest -n $(WORKERS) $(EMULATED)

gate: $(STAMP)
	$(VENV)/bin/python -m perf lowering --all --gate
	$(VENV)/bin/python -m perf traffic --gate

gpu:
	PYTHONPATH=. $(PYTHON) -m perf gpu

lint: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

clean:
	rm -rf .venv .venv-triton-* build *.egg-info

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
ifneq ($(TRITON),)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==$(TRITON) 'numpy<2.4'
endif
	touch $@
