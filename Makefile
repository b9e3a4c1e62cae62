# make demo   a virtual environment, and the main job: fine-tune examples/tiny-llama, compared with LoRA and full
# make test   a virtual environment, and every check that CI runs
# Both start from nothing and can be repeated in any order; PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
VENV   := .venv
CONSTRAINTS ?= constraints.txt
PIP    := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# Two processes with a thread each; a machine with more cores can have more.
JOBS   ?= 2

.PHONY: demo test clean

demo: $(VENV)/.demo
	$(VENV)/bin/losia-pro finetune $(ARGS)

test: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile \
		--cov --cov-report=term:skip-covered --cov-fail-under=90 $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info losia_pro/_cuda*.so

# torch goes first, by itself and pinned: asked for together with others, an unpinned one can win.
$(VENV)/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: PYTHON=...")'
	@echo "Installing into $(VENV): a minute or two, and more where downloads are slow."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch triton
	touch $@

# Everything that decides what is installed; the Python sources are used where they lie (-e).
INPUTS := $(VENV)/.torch pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

$(VENV)/.demo: $(INPUTS)
	$(PIP) -e '.[cli,peft]'
	touch $@

$(VENV)/.test: $(INPUTS)
	$(PIP) -e '.[cli,peft,evaluate,dev]'
	touch $@ $(VENV)/.demo
