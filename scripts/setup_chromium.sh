#!/usr/bin/env bash
# The tests open report.html in headless Chromium. Nothing but the tests needs it.
set -euo pipefail
if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then
  exit 0
fi
install="apt-get update && apt-get install -y --no-install-recommends chromium"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "rome: installing chromium for the tests"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium; } \
    >"$log" 2>&1; then
    exit 0
  fi
  tail -n 15 "$log" >&2
fi
echo "rome: the tests need Chromium. As root on Debian/Ubuntu: $install" >&2
exit 1
