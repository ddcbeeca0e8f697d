# `make sweep` and `make test` need Python 3.11+ and nothing else. pip's own settings are respected: to choose the torch
# build (a plain install on Linux is a CUDA build of several gigabytes), set pip's index or find-links, as in README.md.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Modules are compiled as they are imported, and kept: pip would compile all that is installed, for longer than installing takes.
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --quiet --no-compile --constraint constraints.txt --editable
# Small tensors: a second thread would mostly wait.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal
ZOO := tests/zoo
export PYTHONDONTWRITEBYTECODE :=

.PHONY: sweep test test-fast test-slurm test-ray test-zoo test-track test-rare lint format docs benchmark clean

sweep: $(VENV)/.installed
	$(PY) run.py -m attn_mode=softmax,sigmoid seed=1,2,3 $(ARGS)

test: lint
	$(PYTEST) --ignore=$(ZOO) -m "not rare"

# The unit tests alone.
test-fast: $(VENV)/.installed-dev
	$(PYTEST) --ignore=$(ZOO) -m "not slow and not rare"

# Slow, and rarely broken: the wheel in an environment of its own, a sweep killed at random moments, Hydra's own suites in several
# processes, somebody else's script that raises, dies or is stopped, and the probe in the processes of DDP and FSDP2.
test-rare: $(VENV)/.installed-dev
	$(PYTEST) --ignore=$(ZOO) -m rare

# On a real Slurm and a real Ray: where `sinfo` finds no cluster, ../shared/slurm starts one on this machine.
test-slurm: $(VENV)/.installed-slurm
	@sinfo >/dev/null 2>&1 || { ../shared/slurm/slurm_up.sh acct && ../shared/slurm/slurm_acct.sh; }
	$(PY) -m pytest tests/sweeps/test_clusters.py -k slurm

test-ray: $(VENV)/.installed-ray
	$(PY) -m pytest tests/sweeps/test_clusters.py -k ray

# The norms of transformers', timm's and torchvision's models, and feedback alignment of two of them. Nothing is downloaded but the packages.
test-zoo: $(VENV)/.installed-zoo
	$(PYTEST) $(ZOO)

# W&B offline, MLflow in a file, and a notebook in a kernel.
test-track: $(VENV)/.installed-track $(VENV)/.installed-notebook
	$(PYTEST) tests/trackers tests/notebook

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The site, in build/site. It asks no other host for anything: `python -m http.server -d build/site` shows it.
docs: $(VENV)/.installed-dev
	$(PY) docs/site.py > docs/columns.md.tmp && mv docs/columns.md.tmp docs/columns.md
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

benchmark: $(VENV)/.installed
	$(PY) benchmarks/training_step.py
	$(PY) benchmarks/attention.py
	$(PY) benchmarks/diagnostic.py
	OMP_NUM_THREADS=1 $(PY) benchmarks/products.py
	for sweep in default bf16 widths; do $(PY) benchmarks/sweeps.py $$sweep 1; done

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11: set PYTHON=..., e.g. make test PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(PY)
	$(PIP_INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-slurm $(VENV)/.installed-ray $(VENV)/.installed-zoo $(VENV)/.installed-track $(VENV)/.installed-notebook: $(VENV)/.installed-%: $(VENV)/.installed-dev
	$(PIP_INSTALL) '.[dev,$*]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
