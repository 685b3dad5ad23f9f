"""Rocklet: the server inside a sandbox (C), its compilation, and the client that speaks to it."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile

from rome.envs.common import BackendUnavailable

_FLAGS = ("-O2", "-static", "-pthread", "-Wall", "-Wextra")


def cache_dir() -> pathlib.Path:
  """Where compiled and built things are kept: XDG_CACHE_HOME or ~/.cache, in /rome."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  path = pathlib.Path(base) / "rome"
  path.mkdir(parents=True, exist_ok=True)
  return path


def build() -> pathlib.Path:
  """Returns the static binary, compiled at the first use and cached by the hash of its source.

  Raises:
    BackendUnavailable: there is no C compiler, or it cannot link statically.
  """
  source = pathlib.Path(__file__).with_name("rocklet.c")
  key = hashlib.sha256(source.read_bytes() + " ".join(_FLAGS).encode()).hexdigest()[:16]
  binary = cache_dir() / f"rocklet-{key}"
  if binary.exists():
    return binary
  compiler = shutil.which("gcc") or shutil.which("cc")
  if not compiler:
    raise BackendUnavailable("no C compiler: install gcc (apt-get install gcc libc6-dev)")
  with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
    made = pathlib.Path(scratch) / "rocklet"
    done = subprocess.run(
      [compiler, *_FLAGS, "-o", str(made), str(source)], capture_output=True, text=True, timeout=120
    )
    if done.returncode:
      last = done.stderr.strip().splitlines()[-1:]
      raise BackendUnavailable(f"rocklet does not compile with {compiler}: {' '.join(last)}")
    made.chmod(0o755)
    os.replace(made, binary)  # atomic: two processes may build at once
  return binary
