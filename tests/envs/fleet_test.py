"""The fleet over a real Ray cluster, in a network namespace of its own.

Nothing outside this machine can be reached from there, wherever Ray may try to connect.
"""

import os
import pathlib
import subprocess
import sys

import pytest

CASES = pathlib.Path(__file__).with_name("fleet_cases.py")
SETUP = (
  # Without a resolv.conf even lookups of names go to 127.0.0.1.
  "mount --bind /dev/null /etc/resolv.conf && ip link set lo up && "
  'readlink /proc/self/ns/net >&2 && exec "$0" "$@"'
)


def processes_in(namespace):
  found = []
  for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      if os.readlink(process / "ns" / "net") == namespace:
        found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
    except OSError:
      pass
  return found


def run_cases(path, seconds):
  """Runs a file of cases in a network namespace of its own; nothing may be left in it."""
  command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n0", str(path)]
  process = subprocess.run(
    ["unshare", "--net", "--mount", "sh", "-c", SETUP, *command],
    capture_output=True,
    text=True,
    timeout=seconds,
  )
  assert process.returncode == 0 and " passed" in process.stdout, process.stdout[-20000:]
  namespace = process.stderr.splitlines()[0]
  assert namespace.startswith("net:[") and namespace != os.readlink("/proc/self/ns/net")
  assert not processes_in(namespace)


@pytest.mark.slow
def test_cases_in_a_cluster_without_a_way_out():
  run_cases(CASES, 280)
