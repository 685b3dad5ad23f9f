"""Compiles the C files of this package at first use and registers what XLA calls.

Only gcc is needed: the interface of XLA that is used is C, and jax ships its header. The library is
kept in the user's cache under a name made of everything that it depends on: sources, XLA's header,
flags, compiler and processor (`-march=native`, which a cache on a shared file system would
otherwise carry to another machine). Flags: no -ffast-math and no contraction, since either lets the
compiler round two copies of one loop differently.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import threading

import jax

_FLAGS = (
  *("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno"),
  *("-fvisibility=hidden", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"),
)
_TARGETS = ("rome_native_extend", "rome_native_logits")
_lock = threading.Lock()


class NativeUnavailable(RuntimeError):
  """The native forward pass cannot be built here; the message says why."""


def _cache_dir() -> pathlib.Path:
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  path = pathlib.Path(base) / "rome"
  path.mkdir(parents=True, exist_ok=True)
  return path


def _processor() -> str:
  """What -march=native depends on: model and features of the processor."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
  except OSError:
    return f"{platform.machine()} {platform.processor()}"
  names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
  return "\n".join([platform.machine(), *(line for line in lines if line.startswith(names))])


def build() -> pathlib.Path:
  """Returns the shared library, compiled if the cache has none for this source and machine.

  Raises:
    NativeUnavailable: there is no C compiler, or it does not compile the sources.
  """
  compiler = shutil.which("gcc") or shutil.which("cc")
  if not compiler:
    raise NativeUnavailable("no C compiler: install gcc (apt-get install gcc libc6-dev)")
  here, include = pathlib.Path(__file__).parent, pathlib.Path(jax.ffi.include_dir())
  files = sorted([*here.glob("*.c"), *here.glob("*.h")])
  version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
  texts = [file.read_bytes() for file in (*files, include / "xla/ffi/api/c_api.h")]
  texts += [" ".join(_FLAGS).encode(), version, _processor().encode()]
  key = hashlib.sha256(b"\0".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()[:16]
  library = _cache_dir() / f"native-{key}.so"
  if library.exists():
    return library
  with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
    made = pathlib.Path(scratch) / "native.so"
    sources = [str(file) for file in files if file.suffix == ".c"]
    done = subprocess.run(
      [compiler, *_FLAGS, "-I", str(here), "-I", str(include), "-o", str(made), *sources],
      capture_output=True,
      text=True,
      timeout=300,
    )
    if done.returncode:
      errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
      raise NativeUnavailable(
        f"the native forward pass does not compile with {compiler}: {errors[0]}"
      )
    os.replace(made, library)  # atomic: two processes may build at once
  return library


@functools.cache
def _register() -> None:
  library = ctypes.CDLL(str(build()))
  for name in _TARGETS:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")


def register() -> None:
  """Makes the custom calls known to XLA, once a process.

  Raises:
    NativeUnavailable: see `build`; or the library cannot be written or loaded.
  """
  with _lock:
    try:
      _register()
    except (OSError, subprocess.SubprocessError) as error:
      raise NativeUnavailable(
        f"the native forward pass cannot be built or loaded: {error}"
      ) from None
