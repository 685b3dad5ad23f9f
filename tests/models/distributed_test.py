"""Two processes on one machine train as one process does."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
DEADLINE = 240  # seconds, for the processes of one run together


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def run(count, path):
  """Loss and gradient norm [steps, 2] of `distributed_program`: `count` processes, 4 devices."""
  flags = f"--xla_force_host_platform_device_count={4 // count}"
  env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
  port, processes = str(free_port()), []
  try:
    for rank in range(count):
      command = [sys.executable, "-m", "tests.models.distributed_program"]
      log = (path.parent / f"{path.name}.{rank}.log").open("wb")
      processes.append(
        subprocess.Popen(
          [*command, str(rank), str(count), port, str(path)],
          cwd=ROOT,
          env=env,
          stdout=log,
          stderr=subprocess.STDOUT,
          start_new_session=True,
        )
      )
      log.close()
    end = time.monotonic() + DEADLINE
    for rank, process in enumerate(processes):
      code = process.wait(timeout=max(end - time.monotonic(), 1))
      text = (path.parent / f"{path.name}.{rank}.log").read_text(errors="replace")
      assert code == 0, f"process {rank} of {count}: {text[-3000:]}"
  finally:
    for process in processes:
      process.kill()
      process.wait()
  return np.array(json.loads(path.read_text()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_as_one(tmp_path):
  one = run(1, tmp_path / "one")
  two = run(2, tmp_path / "two")
  np.testing.assert_allclose(two, one, rtol=1e-5)
  assert one.shape == (3, 2)
  assert len(set(one[:, 0])) == 3  # updates changed something
