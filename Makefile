# make demo | make test: everything on a fresh machine; see README.md. Works offline once installed.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
STAMP := .venv/.installed

.PHONY: demo test lint clean install
demo: $(STAMP)
	$(BIN)/cdl run dino $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

install: $(STAMP)
$(STAMP): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints-cpu.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf .venv runs build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
