#!/bin/sh
# Builds .venv from the pinned set.    scripts/install.sh [cpu|gpu] [dev]
#
# The build is cpu, or what .venv already holds.
# Does nothing when .venv already holds that set. Needs Python >= 3.11 with venv, and a package registry.
# uv installs (ten times faster than pip), from the sources that pip is configured with.
# The CPU build of torch is taken from those sources where they have it, else from PyTorch's own CPU index.
set -eu
cd "$(dirname "$0")/.."
venv=.venv
held=$(cat "$venv/build" 2>/dev/null || true)
build=${1:-${held:-cpu}}
extra=${2:-}

say() { echo "install: $*"; }
fail() { echo "install: $*" >&2; exit 1; }

find_python() {
    for candidate in ${PYTHON:-} python3.11 python3.12 python3; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 with the venv module was found. Install it (Debian: python3.11 python3.11-venv) or set PYTHON."
}

# Prints pip's value of one option; the environment wins over the files, as in pip.
pip_option() {
    "$venv/bin/python" -m pip config list 2>/dev/null | sed -n "s/^\([^=]*\)\.$1='\(.*\)'\$/\1 \2/p" |
        awk '$1 == ":env:" { env = $0 } { last = $0 } END { print (env != "" ? env : last) }' |
        sed 's/^[^ ]* *//; s/\\n/ /g; s/^ *//; s/ *$//'
}

use_the_sources_of_pip() {
    index=$(pip_option index-url); extra_index=$(pip_option extra-index-url); links=$(pip_option find-links)
    [ -n "$index" ] && export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
    [ -n "$extra_index" ] && export UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-$extra_index}"
    [ -n "$links" ] && export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo "$links" | tr ' ' ',')}"
    [ -n "${PIP_CERT:-}" ] && export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
    export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"   # what pip does with several sources
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}" UV_LINK_MODE="${UV_LINK_MODE:-copy}"
    return 0
}

uv_install() { "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" "$@"; }

install_cpu() {
    torch=$(grep '^torch==' requirements/cpu.txt)
    if ! uv_install --no-deps "$torch" 2>/dev/null; then
        say "$torch is not in the configured sources: asking PyTorch's own CPU index"
        uv_install --no-deps --torch-backend cpu "$torch" || fail "could not install $torch; see the lines above"
    fi
    uv_install --no-deps -r requirements/cpu.txt
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "vLLM's CPU build needs libnuma.so.1. Install it (Debian: apt-get install libnuma1) and run this again."
}

# No lock for GPUs: the right torch build depends on the driver, which uv detects.
install_gpu() { uv_install --torch-backend auto --override requirements/left_out.txt ".[gpu]"; }

case "$build" in cpu | gpu) ;; *) fail "the first argument is cpu or gpu, not '$build'" ;; esac
[ "${held:-$build}" = "$build" ] || fail "$venv holds the $held build; remove it, or use a checkout of its own for $build"
stamp=$(cat pyproject.toml requirements/*.txt scripts/install.sh | cksum | tr ' ' '-')-$build
if [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

python=$(find_python)
say "building $venv with $("$python" --version) and the pinned $build set (about 4 GB on disk, a minute or two)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements/bootstrap.txt
use_the_sources_of_pip
echo "$build" >"$venv/build"
"install_$build"
[ -z "$extra" ] || uv_install --no-deps -r "requirements/$extra.txt"
uv_install --no-deps --editable .
echo "$stamp" >"$venv/installed-$extra"
[ -z "$extra" ] || echo "$stamp" >"$venv/installed-"
say "done"
