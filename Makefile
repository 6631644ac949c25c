PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-lowest slow fuzz notebooks tiny tree docs style types wheel alone image container clean

demo: $(VENV)-demo/ready  ## evaluate BM25 alone and followed by each of the four rerankers, on Python's documentation; print a table, and write demo/results.json and demo/results.png
	$(VENV)-demo/bin/python experiments/quickstart.py

test: $(VENV)/ready  ## run the tests that are not marked slow, offline, on the CPU; the tests of Terrier run in a separate process
	$(BIN)/python -m pytest --numprocesses auto
	$(BIN)/python -m pytest -m terrier -p no:faulthandler

test-lowest:  ## run the tests of `make test` with the lowest versions that pyproject.toml allows, in a separate environment (6.5 GB with CUDA's libraries)
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[demo,test]'
	build/lowest/bin/python -m pytest --numprocesses auto
	build/lowest/bin/python -m pytest -m terrier -p no:faulthandler

slow: $(VENV)/ready  ## run the tests that are marked slow, except the fuzz tests
	$(BIN)/python -m pytest -m slow --ignore tests/test_fuzz.py

fuzz: $(VENV)/ready  ## run the fuzz tests: 120,000 random frames, texts and checkpoints
	$(BIN)/python -m pytest -m slow tests/test_fuzz.py --durations=0

notebooks: $(VENV)/ready  ## run all notebooks in the small profile, offline, into build/notebooks
	$(BIN)/python experiments/run_notebooks.py --profile small --output build/notebooks

tiny: $(VENV)/ready  ## train the small checkpoints of experiments/tiny again, in about two hours
	$(BIN)/python experiments/tiny/make.py

tree:  ## regenerate the map of files in CONTRIBUTING.md from the files' first sentences
	$(PYTHON) .ci/tree --write

docs: $(VENV)/ready  ## build the pages of pt_docs into build/docs, as PyTerrier's site shows them; a warning is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -c docs pyterrier_lit/pt_docs build/docs

style: $(VENV)/ready  ## ruff: check and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/ready  ## mypy, strict
	$(BIN)/mypy

wheel: $(VENV)/ready  ## build the wheel, and test it in a new environment
	rm -rf build dist && $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(MAKE) alone

alone:  ## install only the wheel in dist in a new environment, import it there, and rerank after Terrier if Java is installed; PYTHON=python3.12 sets another Python
	$(PYTHON) -m venv --clear build/alone && build/alone/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && alone/bin/python -c "import pyterrier_lit; print(pyterrier_lit.__file__, pyterrier_lit.CrossEncoder())"
	cd build && alone/bin/python ../tests/jars.py

image:  ## run the Dockerfile's steps in a new environment without a container, from the files that git tracks, on the CPU
	rm -rf build/image && mkdir -p build/image/source && git ls-files -z | xargs -0 cp --parents --target-directory build/image/source
	build/image/source/.ci/image install $(CURDIR)/build/image/environment
	build/image/source/.ci/image bake $(CURDIR)/build/image/environment
	build/image/source/.ci/image check $(CURDIR)/build/image/environment

container: $(VENV)/ready  ## build the Dockerfile's image, run it without a network, and compare its results with runs outside; requires Docker, Podman, or buildah as root
	$(BIN)/python .ci/container

clean:
	rm -rf $(VENV) $(VENV)-demo build dist demo *.egg-info

$(VENV)/ready: EXTRAS = demo,test
$(VENV)-demo/ready: EXTRAS = demo
$(VENV)/ready $(VENV)-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
