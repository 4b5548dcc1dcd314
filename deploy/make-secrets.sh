#!/usr/bin/env bash
# Make the secrets that docker-compose.yml reads: a random password, once as RabbitMQ's configuration and once
# in the address that the clients use. Does nothing if they are there: RabbitMQ keeps the password that it was
# first started with, so a new one needs `rabbitmqctl change_password` as well.
#
# usage: deploy/make-secrets.sh [FOLDER]        FOLDER: by default secrets/ beside docker-compose.yml
set -euo pipefail

folder="${1:-$(dirname "${BASH_SOURCE[0]}")/../secrets}"
user=fedmq
host=rabbitmq

if [ -e "$folder" ]; then
    if [ -s "$folder/rabbitmq.conf" ] && [ -s "$folder/broker_url" ]; then
        echo "$folder is there already, nothing changed."
        exit 0
    fi
    echo "$folder exists but lacks rabbitmq.conf or broker_url: remove it, or restore them." >&2
    exit 1
fi

umask 077
draft="$(mktemp -d "$folder.XXXXXX")"
trap 'rm -rf "$draft"' EXIT

# Letters and digits only, about 190 bits: nothing to escape in a URL or in RabbitMQ's configuration.
password="$(head -c 96 /dev/urandom | base64 | tr -dc 'A-Za-z0-9' | head -c 32)"
printf 'default_user = %s\ndefault_pass = %s\n' "$user" "$password" >"$draft/rabbitmq.conf"
printf 'amqp://%s:%s@%s:5672/%%2F\n' "$user" "$password" "$host" >"$draft/broker_url"

# Compose mounts these files as they are, owner and mode included, and no container runs as root or as the user
# who made them. So the files are readable, and the folder around them, which is not mounted, is closed.
chmod 444 "$draft/rabbitmq.conf" "$draft/broker_url"
mv "$draft" "$folder"
trap - EXIT
echo "Made $folder. The admin UI's user is '$user', its password stands in $folder/rabbitmq.conf."
