"""The program that measures the scaffold runs, and times turns that take place."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_program_prints_its_line():
  sizes = ["--tokens=2000", "--episodes=6", "--turns=3", "--model_seconds=0.01"]
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.scaffold", *sizes],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  (line,) = map(json.loads, done.stdout.splitlines())
  for part in ("alone", "together"):
    for name in ("byte", "bpe"):
      times = line[part][name]["wall_ms"]
      assert 0 < times["p50"] <= times["p90"] <= times["p99"]
  assert line["together"]["byte"]["episodes"] == 6 and line["look_ms"] > 0
