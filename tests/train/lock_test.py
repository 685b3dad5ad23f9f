"""Two processes and one work directory: the second is told who holds it, and a kill frees it."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from rome.train import lock
from rome.train.config import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
# Holds the lock, and so does not a program of its own that outlives it.
HOLDER = """
import pathlib, subprocess, sys
from rome.train import lock
with lock.hold(pathlib.Path(sys.argv[1])):
  child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
  print(child.pid, flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
  """A process that holds the lock of tmp_path/run until its standard input ends."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
    cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  child = int(process.stdout.readline())
  yield process
  process.kill()
  process.wait()
  os.kill(child, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "done"])
def test_one_process_at_a_time(holder, end, tmp_path):
  with pytest.raises(ConfigError, match=rf"in use by another run \(process {holder.pid} on "):
    with lock.hold(tmp_path / "run"):
      pass
  if end == "killed":
    holder.kill()
  else:
    holder.stdin.close()
  holder.wait()
  with lock.hold(tmp_path / "run"):
    assert (tmp_path / "run" / lock.NAME).read_text().startswith(f"process {os.getpid()} on ")
  with lock.hold(tmp_path / "run"):  # and again, in the same process
    pass


def test_a_second_holder_in_one_process_is_refused(tmp_path):
  with lock.hold(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} "):
    with lock.hold(tmp_path):
      pass


def test_a_directory_that_cannot_be(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot write to --workdir .*file/run .*; choose another"):
    with lock.hold(tmp_path / "file" / "run"):
      pass
