#!/usr/bin/env bash
# Makes sure that a sandbox backend is there: Podman, or bubblewrap where no Podman can run.
# As root on Debian/Ubuntu it installs what is missing; otherwise it says the exact command.
set -euo pipefail
packages="podman runc uidmap slirp4netns fuse-overlayfs bubblewrap"
install="apt-get update && apt-get install -y --no-install-recommends $packages"

have() { command -v "$1" >/dev/null; }

have_podman() { have podman && have runc && have newuidmap && have slirp4netns && have fuse-overlayfs; }

if ! have gcc; then
  echo "rome: no gcc, which builds the sandbox's init program. On Debian/Ubuntu: apt-get install gcc libc6-dev" >&2
  exit 1
fi
if have_podman && have bwrap; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && have apt-get; then
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  echo "rome: installing $packages"
  # $packages is a list of words.
  # shellcheck disable=SC2086
  if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; } \
    >"$log" 2>&1; then
    exit 0
  fi
  tail -n 15 "$log" >&2
  echo "rome: the installation above failed. Mend it and run: $install" >&2
else
  if have apt-get; then
    echo "rome: Podman is not fully installed. As root: $install" >&2
  else
    echo "rome: Podman is not fully installed. Install these with your package manager: $packages" >&2
  fi
fi
if have podman || have bwrap; then
  echo "rome: going on with $(have podman && echo podman || echo bubblewrap), which is here" >&2
  exit 0
fi
echo "rome: there is no sandbox backend. .venv is ready; a machine that allows no namespaces can run programs with" \
  "--sandbox=process --i_accept_no_isolation" >&2
exit 1
