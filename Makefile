# Every target sets up what it needs: a virtual environment with the newest Python that works, and, for the parity
# tests, one with the oldest Python supported and PyTorch.
NEWEST := .venv
OLDEST := .venv-torch
OUT := runs/demo

.PHONY: demo test lint bench bench-optimizers bench-sweep results clean

demo: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.demo --out $(OUT) $(if $(QUICK),--quick)

test: $(NEWEST)/installed $(OLDEST)/installed
	$(NEWEST)/bin/python -m pytest --numprocesses 2
	$(OLDEST)/bin/python -m pytest --numprocesses 2

lint: $(NEWEST)/installed
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/pyright

bench: $(NEWEST)/installed $(OLDEST)/installed
	$(NEWEST)/bin/python -m experiments.bench_train --torch-python $(OLDEST)/bin/python

bench-optimizers: $(OLDEST)/installed
	$(OLDEST)/bin/python -m experiments.bench_optimizers

bench-sweep: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.bench_sweep

results: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.make_results

$(NEWEST)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.13 3.12 3.11) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.11 3.12 3.13) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,torch]'
	touch $@

clean:
	rm -rf $(NEWEST) $(OLDEST) build *.egg-info
