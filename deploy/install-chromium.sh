#!/usr/bin/env bash
# Install Chromium if there is no browser for the tests of the live page, from Debian's own packages.
#
# Where it cannot be installed those tests are skipped, which is fine at home; under CI (CI is set) it is an error.
set -euo pipefail

# Where the tests look for it too (tests/support/browser.py).
BROWSERS="${BROWSERS-chromium chromium-browser google-chrome google-chrome-stable}"

installed() {
    local name
    for name in $BROWSERS; do
        if command -v "$name" >/dev/null; then return 0; fi
    done
    return 1
}

give_up() {
    if [ -n "${CI:-}" ]; then
        echo "Chromium is not installed and $1." >&2
        exit 1
    fi
    echo "Chromium is not installed and $1: the tests of the live page will be skipped."
    exit 0
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null
}

installed && exit 0
command -v apt-get >/dev/null || give_up "there is no apt-get to install it with"
as_root true 2>/dev/null || give_up "installing it takes root, or a sudo that asks for no password"

echo "Installing Chromium ..."
apt update || echo "apt-get update failed; trying with the lists that are there" >&2
apt install --yes --no-install-recommends chromium || give_up "apt-get could not install it"
installed || give_up "apt-get did not bring it"
