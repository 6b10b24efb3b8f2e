# Two commands do all the set-up: `make demo` and `make test`. They make a virtual environment with the versions CI uses.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ABLATIONS := $(addprefix ablation_,sampling stages router sorting depth)

.PHONY: demo space test slow quality docs map notebooks style benchmarks evidence clean

demo: $(VENV)/installed  ## The main job: four sizes of a small reasoning model in one checkpoint, shown and checked
	$(BIN)/hf-elastic lab --output demo

space: $(VENV)/installed  ## The Space on the embedded model: open the address it prints
	$(BIN)/python spaces/phase_plans/app.py

# Three processes of one thread each, for two cores: a quarter of the time a test waits for a process, a disk or a clock.
TESTS := $(BIN)/python -m pytest --numprocesses 3 --dist worksteal
test: $(VENV)/installed  ## The tests, without those that take long
	$(TESTS) -m "not slow"

slow: $(VENV)/installed  ## The tests that take long
	$(TESTS) -m slow

quality: $(VENV)/installed  ## What CI checks besides the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed  ## The site, in build/docs; fails on links and anchors that lead nowhere
	$(BIN)/zensical build --strict --clean

map: $(VENV)/installed  ## CONTRIBUTING's map of the modules, from their docstrings, the docs' table of architectures, and what tables cost
	$(BIN)/python tools/house.py
	$(BIN)/python tools/families.py
	$(BIN)/python tools/tables.py

notebooks: $(VENV)/installed  ## Runs the notebooks in examples/ and stores what they print
	$(BIN)/python tools/notebooks.py

style: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/installed  ## Rewrites benchmarks/results
	for script in loading switching training nested_layout hub_fetch quantization_codec; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python benchmarks/report.py

evidence: $(VENV)/installed  ## The lab's training runs, about five hours; finished runs are kept in benchmarks/.runs
	failed=0; for script in lab_family baselines byte_lm text_lm $(ABLATIONS) phases handover speculation quantization_accuracy; do \
	  $(BIN)/python benchmarks/$$script.py || failed=1; done; $(BIN)/python benchmarks/report.py && exit $$failed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) tools/install.py $(VENV)
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
