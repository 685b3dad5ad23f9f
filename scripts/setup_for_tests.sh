#!/usr/bin/env bash
# Sees to a program that nothing but the tests needs: setup_for_tests.sh PACKAGE COMMAND...
# It is there where one of the commands is; else the Debian package is installed, as root.
set -euo pipefail
package=$1
for command in "${@:2}"; do
  command -v "$command" >/dev/null && exit 0
done
install="apt-get update && apt-get install -y --no-install-recommends $package"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "rome: installing $package for the tests"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package"; } \
    >"$log" 2>&1; then
    exit 0
  fi
  tail -n 15 "$log" >&2
fi
echo "rome: the tests need $package. As root on Debian/Ubuntu: $install" >&2
exit 1
