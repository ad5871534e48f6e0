# make train   train the default recipe on the embedded MNIST     make test   the unit tests
# make check   lint, format and types                             make slow-test   long tests, and make cost-test the timings
# make help    the options of a training                          make slurm-test  the job script on a real Slurm of three small nodes
# make gpu-test  the promises on a GPU                            make oldest-test  the unit tests on the oldest packages allowed
#                                                                 make hosts-test  several hosts, as network namespaces (root, iproute2)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test slow-test cost-test slurm-test slurm-test-newer hosts-test gpu-test oldest-test check help clean

train: .venv/.installed
	$(BIN)/python -m mnist_dist.train --config configs/mnist.yaml $(OPTIONS)

help: .venv/.installed
	@$(BIN)/python -m mnist_dist.train --help

# Three at a time: many tests wait for processes.
test: .venv/.installed-dev
	$(BIN)/python -m pytest -n 3 --dist loadfile $(OPTIONS)

slow-test: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --ignore tests/test_cost.py $(OPTIONS)

# What measures time: nothing beside it.
cost-test: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow tests/test_cost.py $(OPTIONS)

# Three at a time, each on a cluster of its own: these wait for Slurm more than they compute.
slurm-test: .venv/.installed-dev
	$(BIN)/python -m pytest -m slurm -n 3 $(OPTIONS)

# The same on a newer Slurm, unpacked into a folder of its own.
slurm-test-newer: .venv/.installed-dev
	test -d .slurm || slurm/dev_cluster.sh fetch .slurm
	PATH="$(CURDIR)/.slurm/bin:$$PATH" $(BIN)/python -m pytest -m slurm -n 3 $(OPTIONS)

hosts-test: .venv/.installed-dev
	$(BIN)/python -m pytest -m hosts $(OPTIONS)

# Two ranks share a GPU where there is one, with NCCL 2.30 or newer. A rank that waits for its GPU for ever is ended before verify can
# write its answer: the one test that reads it is left out.
gpu-test: .venv/.installed-dev
	TEST_ON_GPU=1 NCCL_MULTI_RANK_GPU_ENABLE=1 $(BIN)/python -m pytest -m 'gpu or not (slow or slurm or hosts)' -n 4 \
		tests/test_gpu.py tests/test_promises.py tests/test_shards.py tests/test_verify.py \
		--deselect tests/test_verify.py::test_a_loader_that_is_sharded_twice_is_named $(OPTIONS)

# The unit tests on the oldest packages that pyproject.toml allows, in an environment of their own.
oldest-test: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -n 3 --dist loadfile $(OPTIONS)

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# venv writes this file last. Where it is missing, an attempt failed, as without Debian's python3-venv, or was cut short: made anew.
.venv/bin/activate:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("expected Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv --clear .venv

.venv/.installed: .venv/bin/activate pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# "torch>=2.10" becomes torch==2.10.*
.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	sed -n '/^dependencies/,/^dev/p' pyproject.toml | grep -o '"[a-z-]*>=[0-9.]*' | sed 's/"//; s/>=/==/; s/$$/.*/' > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-oldest/oldest.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
