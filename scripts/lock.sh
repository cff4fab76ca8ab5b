#!/bin/sh
# Writes requirements/{bootstrap,cpu,dev}.txt with hashes, from pyproject.toml (Linux x86-64, Python 3.11).
# bootstrap.txt keeps its version of uv: to move it, write `uv==…` there first.
# Every pin moves to the newest version that fits. To add a package and keep the other pins:
#   scripts/lock.sh --constraint requirements/cpu.txt --constraint requirements/dev.txt
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/uv ] || { echo "lock: run scripts/install.sh first" >&2; exit 1; }
links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}
compile() {
    .venv/bin/uv pip compile --quiet --no-header --no-annotate --generate-hashes --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 ${links:+--find-links "$links"} "$@"
}
project() { compile --override requirements/left_out.txt "$@" pyproject.toml; }
# Prints the entries, each with its lines of hashes, of the second file that are not in the first.
entries_beyond() {
    awk '/^(-|#|$)/ { next }
         /^[^ ]/ { entry = $1; if (NR == FNR) known[entry] = 1 }
         NR != FNR && !(entry in known)' "$1" "$2"
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -n "$links" ] || set -- "$@" --torch-backend cpu
project --extra cpu "$@" >"$work/cpu.txt"
project --extra cpu --extra dev --constraint "$work/cpu.txt" "$@" >"$work/all.txt"
grep -o '^uv==[^ ]*' requirements/bootstrap.txt >"$work/bootstrap.in"
compile "$work/bootstrap.in" >"$work/bootstrap.txt"
echo "# none" >"$work/none"
entries_beyond "$work/none" "$work/cpu.txt" >requirements/cpu.txt
entries_beyond "$work/cpu.txt" "$work/all.txt" >requirements/dev.txt
entries_beyond "$work/none" "$work/bootstrap.txt" >requirements/bootstrap.txt
grep -c '^[^ ]' requirements/bootstrap.txt requirements/cpu.txt requirements/dev.txt
