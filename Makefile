# `make demo` and `make test` need nothing but Python ≥ 3.10, git and make; both set the environment up first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A worker starts on a share of the files and takes from the others when it is done: what a file sets up is mostly set up once.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal

.PHONY: demo test integration both thorough bench docs pictures notebooks check format clean help
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "voxloss needs Python 3.10 or newer, found $$($(PYTHON) --version). Try: make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "Setting up $(VENV): torch, MONAI, the rest, and the compiled pass on the CPU; a few minutes the first time."
	$(PYTHON) -m venv $(VENV)
	@# Python compiles what is imported; compiling all that is installed would take a minute more.
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	@# nnU-Net brings PyPI's torchvision, which needs the torch for CUDA. Beside another one it cannot be imported, which breaks
	@# what takes it if it is there (Lightning's torchmetrics), while nnU-Net does without.
	@$(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/python -m pip uninstall --quiet --yes torchvision
	$(BIN)/python tests/compile_kernels.py
	@touch $@

demo: $(VENV)/.ready  ## Train on a real brain MRI, check every loss, write out/report.html
	$(BIN)/voxloss demo

test: $(VENV)/.ready  ## Run the quick tests, before every commit
	$(PYTEST)

integration: $(VENV)/.ready  ## Run the slower tests: nnU-Net, notebooks, site, wheel, compilers, terminated processes
	$(PYTEST) -m integration

both: $(VENV)/.ready  ## Run both at once, as CI does
	$(PYTEST) -m "integration or not integration"

thorough: $(VENV)/.ready  ## Run both with hundreds of option combinations and a thousand examples each
	$(PYTEST) --thorough

bench: $(VENV)/.ready  ## Measure time and memory beside MONAI and torch.compile, write docs/performance.md
	$(BIN)/voxloss bench --out docs

docs: $(VENV)/.ready  ## Build the site into site/, offline
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(VENV)/.ready  ## Draw the pictures of the pages into docs/assets, light and dark
	$(BIN)/python -m voxloss_app.pictures docs/assets

notebooks: $(VENV)/.ready  ## Execute all notebooks and save them with their outputs
	$(BIN)/python notebooks/execute.py

check: $(VENV)/.ready  ## Lint, formatting, words, strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/asserts_that_cannot_fail.py
	$(BIN)/python tests/words.py
	$(BIN)/mypy

format: $(VENV)/.ready  ## Fix what lint and formatting can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) out .out-bench site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
