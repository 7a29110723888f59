PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: study beyond test notebooks figures lab mutants faults bench pets-check gpu-check lock clean

study: .venv/installed          ## run every notebook at the miniature profile
	$(BIN)/python run_all.py --workers auto

beyond: .venv/installed         ## what the thesis did not ask: notebooks 10 and 11
	$(BIN)/python run_all.py --only 10 11 --workers auto

test: .venv/installed           ## lint, types, unit tests, notebooks at the smoke profile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

notebooks: study                ## renew the outputs of the committed notebooks
	cp runs/miniature/*.ipynb notebooks/
	$(BIN)/python -m sdaug_utils.evidence.report README.md notebooks/*.ipynb

figures: .venv/installed        ## figures, tables, verdicts and numbers in prose, from results/ alone
	$(BIN)/python run_all.py --from-results
	$(BIN)/python -m sdaug_utils.evidence.report README.md notebooks/*.ipynb

lab: .venv/installed            ## open the notebooks
	$(BIN)/jupyter lab notebooks

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

mutants: .venv/installed        ## plant faults one by one: do the tests see them?
	$(BIN)/python tests/mutants.py

faults: .venv/installed         ## kill the study at random moments, fill its disk: does it end well?
	$(BIN)/python tests/faults.py

bench: .venv/installed          ## what is fast, side by side; README's table "How fast"
	$(BIN)/python benchmarks/bench.py

pets-check: .venv/installed     ## the thesis profile's path on real pets: make pets-check DATA=folder
	$(BIN)/python benchmarks/pets_check.py "$(DATA)"

gpu-check: .venv/installed      ## every technique at full size on this machine's GPU
	$(BIN)/python benchmarks/gpu_check.py

lock: .venv/installed           ## renew requirements.lock from pyproject.toml
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	echo "# Made by 'make lock' from pyproject.toml. CUDA's libraries and triton are left out:" \
	     "torch pins them itself." > requirements.lock
	$(BIN)/pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton)' >> requirements.lock

clean:                          ## remove what can be made again, the store included
	rm -rf .venv .store runs .mypy_cache .pytest_cache .ruff_cache
