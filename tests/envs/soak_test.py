"""The soak, for five minutes: nothing wrong, nothing leaked."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_soak():
  command = [sys.executable, "-m", "benchmarks.soak", "--minutes=5", "--seed=0"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
  figures = json.loads(done.stdout)
  assert figures["violations"] == [] and done.returncode == 0, done.stderr[-500:]
  assert all(count > 0 for count in figures["right"].values())
  assert figures["kills"]["container"] >= 10 and figures["kills"]["manager"] >= 1


def test_one_of_each_piece_of_work_is_right():
  """In one sandbox, unhurried: the work of the soak knows its results."""
  import random

  from benchmarks._soak_work import WORK
  from rome.envs.sandbox import make_sandbox

  with make_sandbox(backend="bubblewrap") as sandbox:
    for name in sorted(WORK):
      sandbox.reset()
      WORK[name](sandbox, random.Random(name))
