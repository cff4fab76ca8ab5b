#!/bin/sh
# Fetches the library of the console's page into serve_app/console/static/vendor/, and records what came.
#   scripts/console_vendor.sh
# It needs npm. Users need neither npm nor this script, because the files are in the package.
# htm's standalone module holds Preact and htm in one file that a browser imports as it is.
set -eu
cd "$(dirname "$0")/.."
htm=3.1.1
preact=10.19.6    # for its licence only: htm 3.1.1 is built with a Preact 10 and has no copy of it
folder=serve_app/console/static/vendor
command -v npm >/dev/null || { echo "console_vendor: npm is needed (Debian: apt-get install npm)" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fetch() {
    (cd "$work" && npm pack --silent "$1@$2" >/dev/null && mkdir "$1" && tar -xzf "$1-$2.tgz" -C "$1" --strip-components=1)
}
fetch htm "$htm"
fetch preact "$preact"
mkdir -p "$folder"
cp "$work/htm/preact/standalone.module.js" "$folder/htm-preact.js"
cp "$work/htm/LICENSE" "$folder/LICENSE.htm.txt"
cp "$work/preact/LICENSE" "$folder/LICENSE.preact.txt"
hash=$(sha256sum "$folder/htm-preact.js" | cut -d' ' -f1)
cat >"$folder/versions.json" <<EOF
{
  "htm-preact.js": {
    "package": "htm",
    "version": "$htm",
    "file": "preact/standalone.module.js",
    "licenses": {"htm": "Apache-2.0", "preact": "MIT"},
    "sha256": "$hash"
  }
}
EOF
chmod 644 "$folder"/*
cat "$folder/versions.json"
