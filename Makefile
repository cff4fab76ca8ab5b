# make serve   build .venv, then serve the two demo models on http://127.0.0.1:8000 (Ctrl-C stops it)
# make test    build .venv, then run every check and test
# make docs    build .venv, then build the documentation site in site/
.PHONY: serve test lint docs install lock model picture upgrade-check
CONFIG ?= deploy_configs/local.yaml
export RAY_USAGE_STATS_ENABLED ?= 0

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

test: lint
	.venv/bin/pytest

lock:
	scripts/lock.sh

# Tries the newest Ray, vLLM, transformers and accelerate, each in an environment of its own.
upgrade-check: install
	.venv/bin/python scripts/upgrade_check.py

# Trains the demo model again (a few minutes on two cores).
model: install
	.venv/bin/python -m serve_app.demo.train

# Draws the plan in README.md again. An empty cache keeps this machine's calibrations out of it.
picture: install
	SERVE_APP_CACHE=$$(mktemp -d) .venv/bin/serve-app plan docs/images/plan.yaml --gpus RTX3090,RTX3090,RTX3080 \
		--svg docs/images/plan.svg
