#!/usr/bin/env bash
# Install RabbitMQ's server if it is not there, from Debian's or Ubuntu's own packages.
#
# fedmq starts private nodes of it as an ordinary user, so no system service is started. Where it cannot be
# installed the in-process broker is used instead, which is fine at home; under CI (CI is set) it is an error.
set -euo pipefail

# Where fedmq looks for it too. Not /usr/sbin: Debian's wrapper there serves root and the user rabbitmq only.
PLACES="${RABBITMQ_PLACES-/usr/lib/rabbitmq/bin:/usr/lib/rabbitmq/lib/*/sbin:/opt/rabbitmq*/sbin:/opt/homebrew/opt/rabbitmq/sbin:/usr/local/opt/rabbitmq/sbin}"
POLICY=/usr/sbin/policy-rc.d

installed() {
    local IFS=: place
    for place in $PLACES; do
        if [ -x "$place/rabbitmq-server" ]; then return 0; fi
    done
    return 1
}

give_up() {
    if [ -n "${CI:-}" ]; then
        echo "RabbitMQ is not installed and $1." >&2
        exit 1
    fi
    echo "RabbitMQ is not installed and $1: the in-process broker will be used."
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

echo "Installing RabbitMQ's server ..."
# Debian starts a service as soon as it is installed, unless this file says no.
if [ ! -e "$POLICY" ]; then
    trap 'as_root rm -f "$POLICY"' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$POLICY" >/dev/null
    as_root chmod 755 "$POLICY"
fi
apt update || echo "apt-get update failed; trying with the lists that are there" >&2
apt install --yes --no-install-recommends rabbitmq-server || give_up "apt-get could not install it"
installed || give_up "apt-get did not bring it"
