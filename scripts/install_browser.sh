#!/bin/sh
# Installs Debian's Chromium for the tests of the console's page, if the machine has none.    scripts/install_browser.sh
set -eu
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "install_browser: installing chromium"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null &&
        command -v chromium >/dev/null && exit 0
fi
echo "install_browser: the tests of the console's page need Chromium, and none is on PATH. Install it as root \
(Debian: apt-get install chromium). Without it these tests are skipped, and fail where SERVE_APP_NEEDS_BROWSER=1." >&2
exit 1
