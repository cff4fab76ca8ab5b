#!/bin/sh
# Writes requirements/cpu.txt and requirements/dev.txt from pyproject.toml (Linux x86-64, Python 3.11).
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/uv ] || { echo "lock: run scripts/install.sh first" >&2; exit 1; }
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
compile() {
    .venv/bin/uv pip compile --quiet --no-header --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --override requirements/left_out.txt \
        ${links:+--find-links "$links"} "$@" pyproject.toml
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -n "$links" ] || set -- --torch-backend cpu
compile --extra cpu "$@" >"$work/cpu.txt"
compile --extra cpu --extra dev --constraint "$work/cpu.txt" "$@" >"$work/all.txt"
grep -vE '^(-|#|$)' "$work/cpu.txt" >requirements/cpu.txt
grep -vE '^(-|#|$)' "$work/all.txt" | grep -vxFf requirements/cpu.txt >requirements/dev.txt
wc -l requirements/cpu.txt requirements/dev.txt
