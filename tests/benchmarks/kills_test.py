"""The program that kills runs: what it counts of a run that was killed and damaged."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_that_is_killed_and_damaged_ends_as_the_others():
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.kills", "--kills=3", "--damage=1", "--updates=30"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=280,
  )
  told = json.loads(done.stdout)
  assert {name: value for name, value in told.items() if "_same_" in name} == {
    f"{which}_same_{part}": True
    for which in ("two_runs", "killed")
    for part in ("params", "metrics", "episodes", "records")
  }
  assert done.returncode == 0 and told["kills"] == 3 and told["rows"] == 6 + 30 + 3
  assert told["left_sandboxes"] == [] and told["doubled_rows"] == 0
  assert told["wrongly_set_aside"] == 0 and told["set_aside"] <= told["damaged"]
