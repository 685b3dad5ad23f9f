"""Latencies of real tool calls of a coding agent, and an environment that takes as long.

What is recorded is in `tool_latencies.json`; `benchmarks.overlap --record` makes it anew.
"""

import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from rome.envs.terminal import TerminalEnv
from rome.train.summary import provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]
LATENCIES = pathlib.Path(__file__).with_name("tool_latencies.json")
SCALE_VARIABLE = "ROME_OVERLAP_SCALE"

# What a coding agent runs here: much looking, some editing, now and then a build or tests.
COMMANDS = (
  "ls -la", "git status --short", "git log --oneline -20", "git diff --stat HEAD~3",
  "cat pyproject.toml", "sed -n 1,120p rome/train/loop.py", "wc -l rome/*/*.py",
  "find . -name '*_test.py' -not -path './.venv/*' | head -100",
  "grep -rn 'def pack' rome", "grep -rn 'chunk_log_ratio' rome tests docs",
  "grep -rnw 'snapshot' rome --include=*.py", "git grep -n 'TODO'",
  "git blame -s rome/trajectory.py", "git log -p --follow -3 rome/ipa/loss.py",
  "python -c 'print(sum(range(10**6)))'", "python -c 'import numpy; print(numpy.__version__)'",
  "python -c 'import jax; print(jax.devices())'", "python -c 'import rome.envs'",
  "python -m compileall -q -f rome/ipa", "python -m json.tool setup.cfg pyproject.toml",
  "ruff check rome", "ruff format --diff rome/ipa", "python -m rome.cli --help",
  "cc -O2 -fsyntax-only rome/envs/rocklet/session.c",
  "cc -O2 -shared -fPIC -x c -o /dev/null rome/envs/rocklet/shell.c",
  "pytest -q -n0 -p no:cacheprovider tests/trajectory_test.py",
  "pytest -q -n0 -p no:cacheprovider tests/text/templates_test.py",
  "pytest -q -n0 -p no:cacheprovider tests/ipa/chunks_test.py",
  "pytest -q -n0 -p no:cacheprovider tests/rollout/groups_test.py",
  "pytest -q --collect-only -p no:cacheprovider tests/ipa",
  "mypy rome/ipa", "pip list", "pip check", "tar cf - rome | sha256sum",
)  # fmt: skip


@functools.cache
def read() -> dict[str, Any]:
  """What was recorded."""
  return json.loads(LATENCIES.read_text())


class Delayed(TerminalEnv):
  """A shell in which every action takes as long as a recorded tool call."""

  def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
    assert self._task is not None
    digest = hashlib.sha256(f"{self._task.id} {self._turn}".encode()).digest()
    calls = read()["calls"]
    drawn = calls[int.from_bytes(digest[:8], "big") % len(calls)]["seconds"]
    time.sleep(drawn * float(os.environ.get(SCALE_VARIABLE, "1")))
    return super().step(action)


def record() -> None:
  """Runs every command three times and keeps how long each took."""
  calls = []
  path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
  for _ in range(3):
    for command in COMMANDS:
      start = time.perf_counter()
      subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=300,
        check=False,
      )
      calls.append({"command": command, "seconds": round(time.perf_counter() - start, 4)})
  LATENCIES.write_text(json.dumps({**provenance(), "calls": calls}, indent=1) + "\n")
