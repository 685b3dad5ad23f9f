"""Rocklet: the server inside a sandbox (C), its compilation, and the client that speaks to it."""

import functools
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


@functools.cache
def build() -> pathlib.Path:
  """Returns the static binary, compiled at the first use and cached by the hash of its source.

  Within a process it stays the same, also where the source changes meanwhile.

  Raises:
    BackendUnavailable: there is no C compiler, or it cannot link statically.
  """
  here = pathlib.Path(__file__).parent
  files = sorted([*here.glob("*.c"), *here.glob("*.h")])
  text = b"\0".join([file.read_bytes() for file in files] + [" ".join(_FLAGS).encode()])
  key = hashlib.sha256(text).hexdigest()[:16]
  binary = cache_dir() / f"rocklet-{key}"
  if binary.exists():
    return binary
  compiler = shutil.which("gcc") or shutil.which("cc")
  if not compiler:
    raise BackendUnavailable("no C compiler: install gcc (apt-get install gcc libc6-dev)")
  with tempfile.TemporaryDirectory(dir=binary.parent) as scratch:
    made = pathlib.Path(scratch) / "rocklet"
    done = subprocess.run(
      [compiler, *_FLAGS, "-o", str(made), *(str(file) for file in files if file.suffix == ".c")],
      capture_output=True,
      text=True,
      timeout=120,
    )
    if done.returncode:
      errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
      raise BackendUnavailable(f"rocklet does not compile with {compiler}: {errors[0]}")
    made.chmod(0o755)
    os.replace(made, binary)  # atomic: two processes may build at once
  return binary
