PYTHON ?= python3.11
BIN = .venv/bin

.PHONY: help study beyond report test notebooks figures lab mutants faults bench pets-check \
        gpu-check slurm-check lock clean

help:                           ## list what there is to make
	@sed -nE 's/^([a-z-]+):.*##( .*)/  make \1#\2/p' Makefile | column -ts '#'

study: .venv/installed          ## run every notebook at the miniature profile, and its report
	$(BIN)/python run_all.py
	$(BIN)/python -m sdaug_utils report

beyond: .venv/installed         ## what the thesis did not ask: notebooks 10 and 11
	$(BIN)/python run_all.py --only 10 11

report: .venv/installed         ## what was run as a site: runs/miniature/report/index.html
	$(BIN)/python -m sdaug_utils report

test: .venv/installed           ## lint, types, unit tests, notebooks at the smoke profile
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

notebooks: study                ## renew the outputs of the committed notebooks
	cp runs/miniature/*.ipynb notebooks/
	$(BIN)/python -m sdaug_utils.evidence.report README.md CLAIMS.md notebooks/*.ipynb

figures: .venv/installed        ## figures, tables, verdicts and numbers in prose, from results/ alone
	$(BIN)/python run_all.py --from-results
	$(BIN)/python -m sdaug_utils.evidence.report README.md CLAIMS.md notebooks/*.ipynb

lab: .venv/installed            ## open the notebooks in JupyterLab
	JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/.jupyter" \
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/README.md

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

mutants: .venv/installed        ## plant faults one by one: do the tests see them?
	$(BIN)/python tests/mutants.py

faults: .venv/installed         ## kill the study at random moments, fill its disk: does it end well?
	$(BIN)/python tests/faults.py

slurm-check: .venv/installed    ## the smoke study on a Slurm of one node, as root: needs slurm-wlm and munge
	$(BIN)/python cluster/slurm_check.py

bench: .venv/installed          ## what is fast, side by side; README's table "How fast"
	$(BIN)/python benchmarks/bench.py

pets-check: .venv/installed     ## the thesis profile's path on real pets: make pets-check DATA=folder
	$(BIN)/python benchmarks/pets_check.py "$(DATA)"

gpu-check: .venv/installed      ## what each part costs on this machine's GPU, in nine minutes
	$(BIN)/python benchmarks/gpu_check.py

lock: .venv/installed           ## renew requirements.lock from pyproject.toml
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	echo "# Made by 'make lock' from pyproject.toml. CUDA's libraries and triton are left out:" \
	     "torch pins them itself." > requirements.lock
	$(BIN)/pip freeze --exclude-editable | grep -vE '^(nvidia|cuda|triton)' >> requirements.lock

clean:                          ## remove what can be made again, the store included
	rm -rf .venv .store runs .mypy_cache .pytest_cache .ruff_cache
