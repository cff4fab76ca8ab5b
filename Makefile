# make serve      build .venv, then serve the two demo models on http://127.0.0.1:8000 (Ctrl-C stops it)
# make test       build .venv, then run every check and test
# make test-fast  build .venv, then run the tests that need neither Ray nor vLLM and compute little
# make docs       build .venv, then build the documentation site in site/
.PHONY: serve test test-fast lint docs install lock model picture facts upgrade-check
CONFIG ?= deploy_configs/local.yaml
# Workers for tests. Each imports torch or has a Ray beside it, so there are four at most.
WORKERS ?= $(shell n=$$(nproc); echo $$(( n > 4 ? 4 : n )))
# The tests of a file stay in one worker, in the order of collection. A worker that crashes fails the run.
SPREAD = -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0
export RAY_USAGE_STATS_ENABLED ?= 0
# Python keeps what it has compiled in .venv. Otherwise every process of Ray and vLLM compiles its imports again.
unexport PYTHONDONTWRITEBYTECODE

serve:
	@scripts/install.sh
	@exec .venv/bin/serve-app run $(CONFIG)

install:
	@scripts/install.sh "" dev

# --strict makes a broken link or anchor an error; with --quiet mkdocs would not count it.
docs: install
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

lint: install docs
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/hadolint docker/Dockerfile.cpu docker/Dockerfile.gpu

# A test that fails is tried once more, with fresh clusters and no other test beside it, because a cluster is some twenty
# processes on a machine that others may use too. The second summary names it. What fails twice fails the run, and so
# does a first run that ends with another status than 1, as when a worker crashes.
define tests
.venv/bin/pytest $(1) || { [ $$? -eq 1 ] && .venv/bin/pytest $(1) -n 0 --last-failed --last-failed-no-failures=none -v; }
endef

# Without a cluster, then clusters beside each other, then one alone, in which a client's time is measured.
test: lint
	$(call tests,$(SPREAD) --ignore=tests/cluster)
	$(call tests,$(SPREAD) tests/cluster -m "not alone")
	$(call tests,tests/cluster -m alone)

test-fast: install
	.venv/bin/pytest $(SPREAD) --ignore=tests/cluster -m "not slow"

lock:
	scripts/lock.sh

# Asks the engines again what they say of public models, which the package ships.
facts: install
	SERVE_APP_CACHE=$$(mktemp -d) .venv/bin/python -m scripts.ship_facts

# Tries the newest Ray, vLLM, transformers and accelerate, each in an environment of its own.
upgrade-check: install
	.venv/bin/python scripts/upgrade_check.py

# Trains the demo model again (a few minutes on two cores).
model: install
	.venv/bin/python -m serve_app.demo.train

# Draws the plan in README.md again. An empty cache keeps this machine's calibrations out of it. Then it takes the pictures
# of the console, of the real demo.
picture: install
	SERVE_APP_CACHE=$$(mktemp -d) .venv/bin/serve-app plan docs/images/plan.yaml --gpus RTX3090,RTX3090,RTX3080 \
		--svg docs/images/plan.svg
	.venv/bin/python -m scripts.console_picture
