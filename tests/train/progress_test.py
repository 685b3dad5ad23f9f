"""What a person sees of a run: a bar on a terminal, and in a file plain lines, few of them."""

import os
import pty
import subprocess
import sys
import termios
import time

from rome.train.progress import Progress

PROGRAM = """
import sys
from rome.train.progress import Progress
with Progress("IPA", 100, 10) as bar:
  for _ in range(90):
    bar.update(success="0.63", loss="0.012", sampled="931 tok/s")
"""


def test_in_a_file_there_are_lines(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM], capture_output=True, timeout=60, check=True
  )
  lines = done.stderr.decode().splitlines()
  assert b"\r" not in done.stderr and not done.stdout
  figures = "success 0.63, loss 0.012, sampled 931 tok/s"
  assert lines[0] == f"IPA 11/100, ? left, {figures}"
  assert lines[-1] == f"IPA 100/100, 00:00 left, {figures}"
  assert len(lines) == 2  # The rest came within LINE_SECONDS.


def test_on_a_terminal_there_is_a_bar():
  ours, theirs = pty.openpty()
  termios.tcsetwinsize(theirs, (24, 80))
  process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs)
  os.close(theirs)
  shown = b""
  try:
    while data := os.read(ours, 65536):
      shown += data
  except OSError:  # Linux says so where the other end is closed.
    pass
  assert process.wait(60) == 0
  os.close(ours)
  last = shown.decode().split("\r")[-2]
  assert "IPA 100/100 |" in last and "left, success 0.63, loss 0.012" in last, shown


def test_the_time_left_leaves_out_the_first_update(capsys, monkeypatch):
  now = [0.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  with Progress("warm start", 10, 0) as bar:
    for at in (100, 102, 104, 124):
      now[0] = at
      bar.update(loss="5")
  lines = capsys.readouterr().err.splitlines()
  assert lines == ["warm start 1/10, ? left, loss 5", "warm start 4/10, 00:48 left, loss 5"]
