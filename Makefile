# Every target says in one line what it does: `make help`.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m rest_nb
export PATH := $(CURDIR)/$(BIN):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
export PYDEVD_DISABLE_FILE_VALIDATION := 1
# Waiting threads sleep instead of spinning: else two programs on two cores take ten times as long, not twice.
export OMP_WAIT_POLICY := passive
NOTEBOOKS := $(wildcard nbs/[023]*.ipynb)

.PHONY: help install repro test lab study rivals speed export data

help: ## Show what each target does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1	/' | expand -t 18

install: .venv/installed ## Make .venv and install the locked packages (about 3 minutes)

.venv/installed: constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "make: Python is %d.%d.%d; expected 3.11 or later, as in: make PYTHON=python3.12" % sys.version_info[:3])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[study]'
	@touch $@

repro: install ## Train the quick study from nothing (about 7 minutes) and print its table
	@dvc repro --quiet quick
	@$(MAKE) --no-print-directory runs/quick/table.txt
	@cat runs/quick/table.txt

runs/quick/table.txt: runs/quick/accuracy.csv nbs/20_colored_mnist.ipynb rest_nb/results.py
	@$(RUN) page quick
	@$(RUN) show quick > $@

runs/quick/accuracy.csv: ;

data: install ## Fetch the raw images, by hash
	@dvc repro --quiet data.dvc

test: data ## Check export, notebooks, library (pytest) and every stored output (nbval); about 7 minutes
	@.ci/exported
	pytest -n 2 --dist loadfile tests
	pytest -n 2 --dist loadfile -q --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg $(NOTEBOOKS)

lab: install ## Open JupyterLab on nbs/
	jupyter lab nbs

study: install ## Bring all stored results, their pages and the README's table up to date (10 to 16 hours; JOBS=4: four rows at once)
	@failed=; \
	$(if $(JOBS),{ dvc repro code sets sets-objects $(if $(REST_NB_FACES),runs/faces/dvc.yaml:set) && \
	$(RUN) train $(JOBS) cpu densities dynamics upweights upweights-001 upweights-002 widths audit audit-005 objects widths-objects audit-objects rivals $(if $(REST_NB_FACES),faces); } || failed=1;) \
	dvc repro --keep-going quick cpu objects sweeps looks runs/rivals/dvc.yaml:rivals $(if $(REST_NB_FACES),runs/faces/dvc.yaml:faces) || failed=1; \
	for budget in cpu objects densities dynamics upweights widths rivals audit; do $(RUN) page $$budget || failed=1; done; \
	$(RUN) rerun nbs/28_cost.ipynb nbs/29_looks.ipynb nbs/2b_claims.ipynb || failed=1; \
	test -z "$$failed"

rivals: install ## Search settings for the 36 methods of the ranking, train all, execute their page (about three hours)
	$(if $(JOBS),dvc repro code sets && $(RUN) train $(JOBS) rivals)
	dvc repro --keep-going runs/rivals/dvc.yaml:rivals
	$(RUN) page rivals

speed: install ## Time networks, and the making of batches, on this machine (15 minutes, nothing else running)
	$(RUN) speed
	$(RUN) rerun nbs/21_speed.ipynb

export: install ## Export the library rest_nb from the notebooks in nbs/, and tell DVC
	nbdev_export
	dvc repro --quiet --single-item code
