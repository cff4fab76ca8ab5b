#!/bin/sh
# Installs Debian's Chromium, and a font for it, for the tests of the console's page, if the machine has none. Exits with 1
# if it cannot.    scripts/install_browser.sh
set -eu

has_browser() {
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return 0; fi
    done
    return 1
}

has_font() {
    [ -n "$(find /usr/share/fonts /usr/local/share/fonts "${HOME:-/root}/.fonts" "${HOME:-/root}/.local/share/fonts" \
        \( -name '*.ttf' -o -name '*.otf' -o -name '*.ttc' \) -print -quit 2>/dev/null)" ]
}

missing=""
has_browser || missing="chromium"
has_font || missing="$missing fonts-liberation" # Without any font, Chromium draws boxes, of other widths than letters.
[ -n "$missing" ] || exit 0
missing=${missing# }

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "install_browser: installing $missing"
    # shellcheck disable=SC2086 # These are one or two packages.
    if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null &&
        has_browser && has_font; then exit 0; fi
fi
echo "install_browser: the tests of the console's page need Chromium and a font, and this machine lacks: $missing. \
Install it as root (Debian: apt-get install $missing). Without Chromium these tests are skipped, and fail where \
SERVE_APP_NEEDS_BROWSER=1." >&2
exit 1
