# Every target sets up what it needs: a virtual environment with the newest Python that works, and, for the parity
# tests, one with the oldest Python supported and PyTorch; what compiles for TPUs, one with their compiler.
NEWEST := .venv
OLDEST := .venv-torch
TUNIX := .venv-tunix
TPU := .venv-tpu
GPU := .venv-gpu
DOCS := .venv-docs
OUT := runs/demo
# Modules are compiled to bytecode when they are first imported: of most that are installed, none ever is.
PIP_INSTALL := -m pip install --quiet --no-compile --constraint constraints.txt --editable
# And what is compiled is kept, whatever the shell says: without it imports are a third of make check.
unexport PYTHONDONTWRITEBYTECODE
# XLA on a CPU takes a step's buffers from the system anew; with large pages it waits for few page faults.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: environments demo check fast-tests test test-tunix test-tpu test-gpu-compile lint docs docs-serve
.PHONY: bench bench-gpu bench-optimizers bench-sweep quantize plan unrolling results clean

environments: $(NEWEST)/installed $(OLDEST)/installed

demo: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.demo --out $(OUT) $(if $(QUICK),--quick)

# The loop while writing: lint, types and the fast tests, without a download.
check: $(NEWEST)/installed
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint fast-tests

fast-tests: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest --quiet --numprocesses 2 -m "not slow and not network and not processes"

# Everything runs on the newest; on the oldest what needs PyTorch, and what an older JAX, Flax or Python may change: the
# authors' traces, every transformation compiled, on a mesh and resumed, the step, the loop, and the command line.
ON_OLDEST := optim/test_golden.py optim/test_stable_lora.py optim/test_conformance.py models/test_parity.py \
    models/test_smollm2.py models/test_generation.py lora data/test_conversations.py data/test_tokenizer.py \
    evaluation/test_likelihood.py training/test_step.py training/test_loop.py training/test_checkpoints.py \
    training/test_sweep.py ecosystem/test_producers.py cli/test_cli.py cli/test_chat_walk.py experiments/test_packing.py test_import.py

# SHARE=2/10 takes a tenth of what make check leaves out, and all else: ten shares are everything.
test: $(NEWEST)/installed $(OLDEST)/installed
	$(NEWEST)/bin/python -m pytest --numprocesses 3 --dist worksteal $(if $(SHARE),--share $(SHARE))
	$(OLDEST)/bin/python -m pytest --numprocesses 3 --dist worksteal $(if $(SHARE),--share $(SHARE)) \
	    $(addprefix tests/,$(ON_OLDEST)) \
	    -k "not conformance or jitted or eight or checkpoint"

test-tunix: $(TUNIX)/installed
	$(TUNIX)/bin/python -m pytest tests/ecosystem/test_tunix.py

# Compiles for TPUs, without one. The other tests' simulated devices are in the way, so their conftest stays out.
test-tpu: $(TPU)/installed
	$(TPU)/bin/python -m pytest --confcutdir tests/tpu tests/tpu

# Compiles for an H100, without one, by the CUDA plugin (about 4 GB to install).
test-gpu-compile: $(GPU)/installed
	$(GPU)/bin/python -m pytest --confcutdir tests/gpu tests/gpu

lint: $(NEWEST)/installed
	$(NEWEST)/bin/ruff check .
	$(NEWEST)/bin/ruff format --check .
	$(NEWEST)/bin/pyright

# Fails on any broken link, missing page or unknown name.
docs: $(DOCS)/installed
	$(DOCS)/bin/mkdocs build --quiet --strict

docs-serve: $(DOCS)/installed
	$(DOCS)/bin/mkdocs serve

bench: $(NEWEST)/installed $(OLDEST)/installed
	$(NEWEST)/bin/python -m experiments.benchmarks.bench_train --torch-python $(OLDEST)/bin/python

# On a machine with a GPU, in an environment of its own: make bench-gpu PYTHON=python3. TINY=1 tries it on a CPU.
bench-gpu: $(if $(PYTHON),,$(NEWEST)/installed $(OLDEST)/installed)
	$(if $(TINY),rm -f build/bench_gpu.json)
	$(or $(PYTHON),$(NEWEST)/bin/python) -m experiments.bench_gpu --torch-python $(or $(PYTHON),$(OLDEST)/bin/python) \
	    $(if $(TINY),--tiny --steps 2 --out build/bench_gpu.json)

bench-optimizers: $(OLDEST)/installed
	$(OLDEST)/bin/python -m experiments.benchmarks.bench_optimizers

quantize: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.benchmarks.quantize

plan: $(TPU)/installed
	$(TPU)/bin/python -m experiments.benchmarks.plan_tables

# Counts a step compiled for an H100 that is only described.
unrolling: $(GPU)/installed
	$(GPU)/bin/python -m experiments.benchmarks.unrolling

bench-sweep: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.benchmarks.bench_sweep

results: $(NEWEST)/installed
	$(NEWEST)/bin/python -m experiments.make_results

$(NEWEST)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.13 3.12 3.11) -m venv $(NEWEST)
	$(NEWEST)/bin/python $(PIP_INSTALL) '.[dev]'
	touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.11 3.12 3.13) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP_INSTALL) '.[dev,torch]'
	touch $@

# Tunix pins an older safetensors than constraints.txt, and asks for much that its trainer never imports: so it is laid, with the few
# packages it does import, over the newest environment, without its pins.
$(TUNIX)/installed: $(NEWEST)/installed Makefile
	$(NEWEST)/bin/python -m venv $(TUNIX)
	$(NEWEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > $$($(TUNIX)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth
	$(TUNIX)/bin/python -m pip install --quiet --no-deps google-tunix==0.1.7 google-metrax==0.2.4 clu==0.0.12 \
	    perfetto==0.59.1 sentencepiece==0.2.3 wrapt==2.5.2
	touch $@

$(TPU)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.13 3.12 3.11) -m venv $(TPU)
	$(TPU)/bin/python $(PIP_INSTALL) '.[dev,tpu]'
	touch $@

$(GPU)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.13 3.12 3.11) -m venv $(GPU)
	$(GPU)/bin/python $(PIP_INSTALL) '.[dev,cuda]'
	touch $@

$(DOCS)/installed: pyproject.toml constraints.txt
	$$(.ci/find-python 3.13 3.12 3.11) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP_INSTALL) '.[docs]'
	touch $@

clean:
	rm -rf $(NEWEST) $(OLDEST) $(TUNIX) $(TPU) $(GPU) $(DOCS) build *.egg-info
