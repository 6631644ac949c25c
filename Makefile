PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-lowest slow fuzz notebooks tiny tree docs style types wheel alone image container clean

demo: $(VENV)-demo/ready  ## BM25, and the four rerankers after it, on Python's own documentation: a table, demo/results.json and demo/results.png
	$(VENV)-demo/bin/python experiments/quickstart.py

test: $(VENV)/ready  ## the tests, offline, on the CPU, without those marked slow; those of Terrier in a process of their own
	$(BIN)/python -m pytest --numprocesses auto
	$(BIN)/python -m pytest -m terrier -p no:faulthandler

test-lowest:  ## the same with the lowest versions that pyproject.toml allows, in an environment of its own (6.5 GB with CUDA's libraries)
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/pip install --quiet --constraint constraints-lowest.txt --editable '.[demo,test]'
	build/lowest/bin/python -m pytest --numprocesses auto
	build/lowest/bin/python -m pytest -m terrier -p no:faulthandler

slow: $(VENV)/ready  ## the tests marked slow, without the fuzzing
	$(BIN)/python -m pytest -m slow --ignore tests/test_fuzz.py

fuzz: $(VENV)/ready  ## 120,000 random frames, texts and checkpoints
	$(BIN)/python -m pytest -m slow tests/test_fuzz.py --durations=0

notebooks: $(VENV)/ready  ## run all notebooks in the small profile, offline, into build/notebooks
	$(BIN)/python experiments/run_notebooks.py --profile small --output build/notebooks

tiny: $(VENV)/ready  ## train the small checkpoints of experiments/tiny anew, in about two hours
	$(BIN)/python experiments/tiny/make.py

tree:  ## write the map of files in CONTRIBUTING.md anew, from the files' first lines
	$(PYTHON) .ci/tree --write

docs: $(VENV)/ready  ## the pages of pt_docs as PyTerrier's site shows them, in build/docs; a warning is an error
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -c docs pyterrier_lit/pt_docs build/docs

style: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/ready  ## mypy, strict
	$(BIN)/mypy

wheel: $(VENV)/ready  ## build the wheel, and see that it works alone
	rm -rf build dist && $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(MAKE) alone

alone:  ## install the wheel in dist alone in a new environment, import it from there, rerank after Terrier where Java is; PYTHON=python3.12 for another Python
	$(PYTHON) -m venv --clear build/alone && build/alone/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && alone/bin/python -c "import pyterrier_lit; print(pyterrier_lit.__file__, pyterrier_lit.CrossEncoder())"
	cd build && alone/bin/python ../tests/jars.py

image:  ## the Dockerfile's steps in a new environment, from the files that git knows, on the CPU and without the container
	rm -rf build/image && mkdir -p build/image/source && git ls-files -z | xargs -0 cp --parents --target-directory build/image/source
	build/image/source/.ci/image install $(CURDIR)/build/image/environment
	build/image/source/.ci/image bake $(CURDIR)/build/image/environment
	build/image/source/.ci/image check $(CURDIR)/build/image/environment

container: $(VENV)/ready  ## the Dockerfile's image: built, run without a network, compared with runs outside; Docker, Podman, or buildah as root
	$(BIN)/python .ci/container

clean:
	rm -rf $(VENV) $(VENV)-demo build dist demo *.egg-info

$(VENV)/ready: EXTRAS = demo,test
$(VENV)-demo/ready: EXTRAS = demo
$(VENV)/ready $(VENV)-demo/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
