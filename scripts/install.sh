#!/bin/sh
# Builds .venv from the pinned set.    scripts/install.sh [cpu|gpu] [dev]
#
# The build is cpu, or what .venv already holds.
# Does nothing when .venv already holds that set. Needs Python >= 3.11 with venv, and a package registry.
# uv installs (ten times faster than pip), from the sources that pip is configured with.
# The CPU set is installed by the hashes of the lock, so that no source can put another file in its place.
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

# Every file must have a hash of the lock, whichever source it comes from.
uv_install_locked() { uv_install --no-deps --require-hashes "$@"; }

# Where no source answers, uv would try each for minutes. So they are asked for torch first, without a download.
has_torch() {
    UV_HTTP_CONNECT_TIMEOUT="${UV_HTTP_CONNECT_TIMEOUT:-10}" UV_HTTP_TIMEOUT="${PROBE_TIMEOUT_S:-30}" UV_HTTP_RETRIES=1 \
        uv_install --no-deps --dry-run "$@" 2>"$venv/probe.log"
}
no_network() {
    grep -qiE 'failed to fetch|error sending request|timed out|dns error|client error' "$venv/probe.log"
}
require_torch() {
    has_torch "$torch" && return 0
    if no_network; then unreachable "a configured package source"; fi
    say "$torch is not in the configured sources: asking PyTorch's own CPU index"
    backend="--torch-backend cpu"
    # shellcheck disable=SC2086  # Two words.
    has_torch $backend "$torch" && return 0
    if no_network; then unreachable "PyTorch's own CPU index"; fi
    fail "no source has $torch for $("$venv/bin/python" --version): $(tail -n 1 "$venv/probe.log")"
}
unreachable() {
    fail "$1 does not answer: $(grep -m 1 -oiE 'failed to fetch.*|error sending.*' "$venv/probe.log" || tail -n 1 "$venv/probe.log"). \
Check the network and pip's index-url and extra-index-url, or name a folder that has the files by PIP_FIND_LINKS."
}

install_cpu() {
    torch=$(grep -o '^torch==[^ ]*' requirements/cpu.txt) backend=
    require_torch
    # Of torch the lock has the build for Python 3.11; of the others the files for every Python.
    if "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        awk '/^[^ ]/ { keep = /^torch==/ } keep' requirements/cpu.txt >"$venv/torch.txt"
        # shellcheck disable=SC2086
        uv_install_locked $backend -r "$venv/torch.txt"
    else
        say "the lock has the hash of $torch for Python 3.11 only: this one's is not checked"
        # shellcheck disable=SC2086
        uv_install --no-deps $backend "$torch"
    fi
    uv_install_locked -r requirements/cpu.txt
    "$venv/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
        fail "vLLM's CPU build needs libnuma.so.1. Install it (Debian: apt-get install libnuma1) and run this again."
}

# vLLM's wheel is built for CUDA 13.0, whichever build of torch uv takes, and that needs this driver.
least_driver=580.65
warn_of_an_old_driver() {
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
    case "$driver" in '' | *[!0-9.]*) return 0 ;; esac
    [ "$(printf '%s\n' "$driver" "$least_driver" | sort -V | head -n 1)" = "$least_driver" ] ||
        say "this machine has NVIDIA driver $driver, and vLLM's wheel needs $least_driver or later: only infer_backend: pt may work"
}

# No lock, and so no hashes, for GPUs: the right torch build depends on the driver, which uv detects. torchvision,
# torchaudio and torchcodec, which the CPU set leaves out, come in torch's build: some models of images and sound need them.
install_gpu() { warn_of_an_old_driver; uv_install --torch-backend auto ".[gpu]"; }

case "$build" in cpu | gpu) ;; *) fail "the first argument is cpu or gpu, not '$build'" ;; esac
[ "${held:-$build}" = "$build" ] || fail "$venv holds the $held build; remove it, or use a checkout of its own for $build"
stamp=$(cat pyproject.toml requirements/*.txt scripts/install.sh | cksum | tr ' ' '-')-$build
if [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

python=$(find_python)
say "building $venv with $("$python" --version) and the pinned $build set (about 4 GB on disk, a minute or two)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --retries 2 --timeout 60 \
    --require-hashes -r requirements/bootstrap.txt ||
    fail "could not install uv; see the lines above"
use_the_sources_of_pip
echo "$build" >"$venv/build"
"install_$build"
[ -z "$extra" ] || uv_install_locked -r "requirements/$extra.txt"
# The lock has setuptools; without a lock uv fetches what builds the project.
if [ "$build" = cpu ]; then uv_install --no-deps --no-build-isolation --editable .; else uv_install --no-deps --editable .; fi
echo "$stamp" >"$venv/installed-$extra"
[ -z "$extra" ] || echo "$stamp" >"$venv/installed-"
say "done"
