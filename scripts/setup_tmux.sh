#!/usr/bin/env bash
# The tests drive `rome agent` in a real terminal, tmux. Nothing but the tests needs it.
set -euo pipefail
command -v tmux >/dev/null && exit 0
install="apt-get update && apt-get install -y --no-install-recommends tmux"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "rome: installing tmux for the tests"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends tmux; } \
    >"$log" 2>&1; then
    exit 0
  fi
  tail -n 15 "$log" >&2
fi
echo "rome: the tests need tmux. As root on Debian/Ubuntu: $install" >&2
exit 1
