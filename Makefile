# Every target sets up what it needs: a virtual environment with the newest Python that works, and, for the parity
# tests, one with the oldest Python supported and PyTorch; what compiles for TPUs, one with their compiler.
NEWEST := .venv
OLDEST := .venv-torch
TPU := .venv-tpu
OUT := runs/demo

.PHONY: demo test test-tpu lint bench bench-optimizers plan clean

demo: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.demo --out $(OUT) $(if $(QUICK),--quick)

test: $(NEWEST)/installed $(OLDEST)/installed
	$(NEWEST)/bin/python -m pytest --numprocesses 2
	$(OLDEST)/bin/python -m pytest --numprocesses 2

# Compiles for TPUs, without one. The other tests' simulated devices are in the way, so their conftest stays out.
test-tpu: $(TPU)/installed
	$(TPU)/bin/python -m pytest --confcutdir tests/tpu tests/tpu

lint: $(NEWEST)/installed
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/pyright

bench: $(NEWEST)/installed $(OLDEST)/installed
	$(NEWEST)/bin/python -m experiments.bench_train --torch-python $(OLDEST)/bin/python

bench-optimizers: $(OLDEST)/installed
	$(OLDEST)/bin/python -m experiments.bench_optimizers

plan: $(TPU)/installed
	$(TPU)/bin/python -m experiments.plan_tables

$(NEWEST)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.13 3.12 3.11) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.11 3.12 3.13) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,torch]'
	touch $@

$(TPU)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.13 3.12 3.11) -m venv $(TPU)
	$(TPU)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tpu]'
	touch $@

clean:
	rm -rf $(NEWEST) $(OLDEST) $(TPU) build *.egg-info
