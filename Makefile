# Two commands set everything up: `make demo` and `make test`. Neither needs root, a GPU or a system ffmpeg.

VENV ?= .venv
# The first of these that runs and is a Python that torch 2.11 supports here.
PYTHON ?= $(shell for python in python3.12 python3.11 python3.10 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' \
	2>/dev/null && echo $$python && break; done)
INSTALL := VENV="$(VENV)" PIP_OPTIONS=-q deploy/install.sh

# Processes that run tests side by side; each takes up to 4 GB. 0: this one.
WORKERS ?= 2

export VIDEOS

.PHONY: help install demo test bench clean

help:
	@echo "make demo                  generate a world of sounding objects, pretrain on it, write runs/demo/report.html"
	@echo "make demo VIDEOS=FOLDER    the same on your own videos"
	@echo "make install               only set up .venv"
	@echo "make test                  run the tests, two at a time (TESTS='-k queue' picks some, WORKERS=1)"
	@echo "make bench                 loaders, shard making and training step beside what else could do it (25 minutes)"
	@echo "make clean                 remove runs/demo* and the virtual environment"

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(VENV)/bin/python tools/demo.py $(if $(VIDEOS),--videos "$$VIDEOS") $(DEMO)

test: $(VENV)/.installed-tests
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

bench: $(VENV)/.installed-bench
	$(VENV)/bin/python benchmarks/make_shards.py
	$(VENV)/bin/python benchmarks/loader_throughput.py
	$(VENV)/bin/python benchmarks/loader_memory.py
	$(VENV)/bin/python benchmarks/feature_extraction.py
	$(VENV)/bin/python benchmarks/convolutions.py
	$(VENV)/bin/python benchmarks/losses.py
	$(VENV)/bin/python benchmarks/train_step.py
	$(VENV)/bin/python benchmarks/logging_overhead.py

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No Python 3.10, 3.11 or 3.12 with venv found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created setup.py constraints.txt
	@echo "Installing PyTorch and the rest into $(VENV) (about 6 GB, minutes on a fast network) ..."
	$(INSTALL) python
	@touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	EXTRAS=test $(INSTALL) python
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	EXTRAS=bench $(INSTALL) python
	@touch $@

clean:
	rm -rf $(VENV) runs/demo*
