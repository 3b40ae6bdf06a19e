#!/bin/sh
# Unpack Chromium into .cache/chromium/root, without installing anything on the machine. Run again, it does
# nothing; nor does it where chromium is installed. Needs a Debian or an Ubuntu with its package mirrors in
# reach; no root. Where that is not so it says why and succeeds: the tests of pages are then skipped with
# that reason.
set -eu

cache=$(cd "$(dirname "$0")/../.." && pwd)/.cache/chromium
packages="chromium fonts-dejavu-core"

if [ -f "$cache/complete" ] || command -v chromium >/dev/null; then
    exit 0
fi
mkdir -p "$cache/archives/partial" "$cache/lists/partial" "$cache/log"

give_up() {
    echo "$1" >"$cache/unavailable"
    echo "install.sh: no Chromium here: $1" >&2
    exit 0
}

# All of apt's own state lives in the cache: neither root nor a lock of the system is needed.
apt() {
    apt-get -y -qq \
        -o Dir::Cache="$cache" -o Dir::Cache::archives="$cache/archives" -o Dir::State::lists="$cache/lists" \
        -o Dir::Log="$cache/log" -o Debug::NoLocking=1 -o APT::Sandbox::User="" -o Acquire::Retries=3 "$@"
}

command -v apt-get >/dev/null || give_up "apt-get is not installed"
command -v dpkg >/dev/null || give_up "dpkg is not installed"
apt update || give_up "apt-get update failed"
# shellcheck disable=SC2086  # one word for each package
apt install --no-install-recommends --download-only $packages || give_up "the packages cannot be downloaded"

rm -rf "$cache/root"
mkdir -p "$cache/root"
for package in "$cache"/archives/*.deb; do
    dpkg -x "$package" "$cache/root"
done
rm -rf "$cache/archives" "$cache/lists" "$cache/unavailable"
touch "$cache/complete"
