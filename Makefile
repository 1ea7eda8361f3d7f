# Everything runs in .venv, which `make setup` builds from requirements.txt and the extra dev of pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-programs test-other coverage torture audit lint bench docs notebook dist check-dist clean

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "adregnet_jax needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": call make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python train.py --config configs/phantom_demo.py --workdir runs/demo
	$(BIN)/python eval.py --config configs/phantom_demo.py --workdir runs/demo
	@echo "The pictures are in runs/demo/eval/figures, the tables in runs/demo/eval."

# Everything but the tests marked `program`, which `make test-programs` runs: they take three minutes more.
test: setup
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal -m "not program"

test-programs: setup
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal -m program

# The files, the commands and the operations, without what compiles for minutes:
# make test-other PYTHON=python3.13
OTHER := .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
OTHER_TESTS := tests/bad_inputs tests/cli tests/data tests/launch/test_launch.py tests/report tests/weights \
	tests/registration/test_export.py tests/registration/test_field.py tests/training/test_checkpoint.py \
	tests/training/test_record.py tests/ops/test_composition.py tests/ops/test_filters.py tests/ops/test_jacobian.py \
	tests/ops/test_sampling.py tests/nn/test_layers.py tests/test_architecture.py tests/test_packaging.py

test-other:
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/pip install --quiet --editable '.[dev]'
	$(OTHER)/bin/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal $(OTHER_TESTS)

torture: setup
	$(BIN)/python -m tools.torture

coverage: setup
	$(BIN)/pip install --quiet --requirement tools/torture/requirements.txt
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --cov --cov-report=term

audit: setup
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet pip-audit
	for lock in requirements-*.lock; do .venv/audit/bin/pip-audit --requirement $$lock --no-deps --disable-pip || exit; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m adregnet_jax.benchmark --config configs/phantom.py
	$(BIN)/python benchmarks/against_torch.py
	$(BIN)/python benchmarks/convolution.py
	$(BIN)/python benchmarks/neighbourhood_attention.py
	$(BIN)/python benchmarks/warp.py
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/evaluation.py
	$(BIN)/python benchmarks/synthesis.py

# The site in site/; `mkdocs serve` shows it while you write.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Runs the notebook of the documents and keeps its pictures.
notebook: .venv/.docs
	$(BIN)/jupyter execute --inplace docs/notebooks/registration.ipynb

.venv/.docs: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

dist: setup
	rm -rf dist
	$(BIN)/python -m build

# The wheel in an empty environment, on the sample pair.
check-dist: setup
	tools/check_dist.sh $(BIN)/python

clean:
	rm -rf .venv .venv-* build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
