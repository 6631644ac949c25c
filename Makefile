PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test notebooks style wheel clean

demo: $(VENV)/ready  ## BM25 >> CrossEncoder on Python's own documentation: a table, demo/results.json and demo/results.png
	$(BIN)/python experiments/quickstart.py

test: $(VENV)/ready  ## all tests, offline, on the CPU
	$(BIN)/python -m pytest

notebooks: $(VENV)/ready  ## run all notebooks in the small profile, in place
	$(BIN)/python experiments/run_notebooks.py

style: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

wheel: $(VENV)/ready  ## build the wheel, install it alone in a new environment, import it from there
	rm -rf build dist && $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv --clear build/alone && build/alone/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && alone/bin/python -c "import pyterrier_lit; print(pyterrier_lit.__file__, pyterrier_lit.CrossEncoder())"

clean:
	rm -rf $(VENV) build dist demo *.egg-info

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,test]'
	touch $@
