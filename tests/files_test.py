"""Files are replaced in one step, and a disk that takes no more is told in one line."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from rome import files


@pytest.fixture
def small():
  """Files that may have 1,000 bytes; fails the writes that a full disk fails."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
  yield
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_replaced(tmp_path):
  path = tmp_path / "a.json"
  files.write_atomic(path, "é\n")
  assert path.read_bytes() == "é\n".encode()
  files.write_atomic(path, b"\x00")
  assert path.read_bytes() == b"\x00" and os.listdir(tmp_path) == ["a.json"]


def test_what_cannot_be_written_leaves_the_old(tmp_path, small):
  path = tmp_path / "a.json"
  files.write_atomic(path, "old")
  with pytest.raises(files.WriteError) as error:
    files.write_atomic(path, b"x" * 1001)
  assert str(error.value) == (
    f"{path} could not be written (File too large); see to the free space and the permissions of "
    f"{tmp_path}, then start the same command again"
  )
  assert error.value.strerror == "File too large"
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_a_directory_that_is_not_there(tmp_path):
  with pytest.raises(files.WriteError, match="none/a could not be written .No such file"):
    files.write_atomic(tmp_path / "none" / "a", "x")


def test_appending_tells_too_and_closing_is_quiet(tmp_path, small):
  path = tmp_path / "rows"
  with open(path, "ab", buffering=0) as file:
    files.append(file, b"x" * 600)
    with pytest.raises(files.WriteError, match="rows could not be written"):
      files.append(file, b"y" * 600)
  assert path.read_bytes()[:600] == b"x" * 600


_WRITER = """
import sys
from rome import files
for n in range(10**9):
  files.write_atomic(sys.argv[1], bytes([n % 256]) * 50_000)
  if n == 3:
    print(flush=True)
"""


def test_a_killed_writer_leaves_one_or_the_other(tmp_path):
  path = tmp_path / "file"
  command = [sys.executable, "-c", _WRITER, str(path)]
  root = pathlib.Path(__file__).parents[1]
  with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
    assert process.stdout.readline()
    for _ in range(50):
      data = path.read_bytes()
      assert len(data) == 50_000 and len(set(data)) == 1
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
  data = path.read_bytes()
  assert len(data) == 50_000 and len(set(data)) == 1
