# `make demo` and `make test` need only Python 3.11 to 3.13; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install demo test lint peers clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: Python 3.11 to 3.13 is needed; pass PYTHON=/path/to/python3.11"; exit 2; }
	@echo "installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@# torch first, alone: a range would let another package choose a CUDA build of it
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: install
	@$(BIN)/python pipelines/grpo.py

test: install lint
	@$(BIN)/python -m pytest -q

# The peers of benchmarks/pretrain_speed.py and grpo_speed.py, in an environment of their own.
peers: .venv-peers/.installed

.venv-peers/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . \
	  -r benchmarks/requirements.txt
	@touch $@

lint: install
	@$(BIN)/ruff check .

clean:
	rm -rf .venv .venv-peers build *.egg-info
