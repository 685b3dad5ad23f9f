"""Episodes on the hosts of a real Ray cluster, in a network namespace of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

from rome.rollout import WorkersConfig
from tests.envs.fleet_test import SETUP, processes_in

CASES = pathlib.Path(__file__).with_name("workers_cases.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cases_in_a_cluster_without_a_way_out():
  command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-n0", str(CASES)]
  process = subprocess.run(
    ["unshare", "--net", "--mount", "sh", "-c", SETUP, *command],
    capture_output=True,
    text=True,
    timeout=560,
  )
  assert process.returncode == 0 and " passed" in process.stdout, process.stdout[-20000:]
  namespace = process.stderr.splitlines()[0]
  assert namespace.startswith("net:[") and namespace != os.readlink("/proc/self/ns/net")
  assert not processes_in(namespace)


def test_settings():
  with pytest.raises(ValueError, match="workers.slots must be at least 1 with workers.address"):
    WorkersConfig(address="auto")
  with pytest.raises(ValueError, match="workers.slots must be 0 without workers.address, got 4"):
    WorkersConfig(slots=4)
