"""The soak, for five minutes: nothing wrong, nothing leaked."""

import json
import random
import subprocess
import sys

import pytest

from benchmarks import _soak_watch
from benchmarks._soak_work import WORK, Place
from rome.envs.sandbox import make_sandbox


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_soak():
  command = [sys.executable, "-m", "benchmarks.soak", "--minutes=5", "--seed=0"]
  done = subprocess.run(command, capture_output=True, text=True, timeout=1100)
  figures = json.loads(done.stdout)
  assert figures["violations"] == [] and done.returncode == 0, done.stderr[-500:]
  assert all(count > 0 for count in figures["right"].values())
  assert figures["kills"]["manager"] >= 1 and figures["growth"]["manager"] is not None
  assert sum(figures["kills"].values()) >= 20


@pytest.mark.slow
def test_one_of_each_piece_of_work_is_right():
  """In one sandbox, unhurried: the work of the soak knows its results."""
  with make_sandbox(backend="bubblewrap") as sandbox:
    for name in sorted(WORK):
      sandbox.reset()
      WORK[name](Place(random.Random(name), sandbox=sandbox))


def _process(samples):
  return _soak_watch.Watched(1, "manager", samples=samples)


def test_growth_is_unknown_where_samples_are_few():
  steady = [(i * 0.5, 100.0, 40) for i in range(2000)]
  assert _soak_watch.growth(_process(steady)).mib == 0
  assert _soak_watch.growth(_process(steady[:150])) is None  # not past its level for long
  assert _soak_watch.growth(_process(steady[::50])) is None
  assert _soak_watch.growth(_process([])) is None


def test_growth_is_the_slope_whatever_the_noise():
  rng = random.Random(0)
  leaking = [(i * 0.5, 100 + i * 0.01 + rng.gauss(0, 2), 40 + i // 100) for i in range(2000)]
  growth = _soak_watch.growth(_process(leaking))
  assert growth.mib == pytest.approx(19.1, abs=1) and growth.fds == pytest.approx(19, abs=2)
  assert growth.mib_per_hour == pytest.approx(72, abs=4)
