"""How fast this machine reads memory: the bound of a decode step that must read every weight.

CPUs: a C loop, compiled when asked for, that sums float32 in whole vectors and prefetches 2 KiB
ahead; one thread a core that this process may use, each on its own part of 512 MiB, far more than
the caches hold. Accelerators: jax's sum of 1 GiB. Nothing is written but the sums.
"""

import concurrent.futures
import ctypes
import os
import pathlib
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

_SOURCE = """
typedef float v16 __attribute__((vector_size(64), aligned(4)));
float read_all(const float *x, long n) {
  v16 sum[8] = {0};
  for (long i = 0; i + 128 <= n; i += 128)
    for (int j = 0; j < 8; j++) {
      __builtin_prefetch(x + i + 16 * j + 512);
      sum[j] += *(const v16 *)(x + i + 16 * j);
    }
  for (int j = 1; j < 8; j++) sum[0] += sum[j];
  return sum[0][0];
}
"""
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


class Reader:
  """Measures the read bandwidth of jax's default device."""

  def __init__(self) -> None:
    self.how = f"jax sum of 1 GiB on {jax.devices()[0].device_kind}"
    if jax.default_backend() != "cpu":
      return
    self._cores = len(os.sched_getaffinity(0))
    self.how = f"C loop, 512 MiB, {self._cores} threads"
    with tempfile.TemporaryDirectory() as directory:
      source = pathlib.Path(directory) / "read.c"
      source.write_text(_SOURCE)
      library = source.with_suffix(".so")
      subprocess.run(["gcc", *_FLAGS, "-o", library, source], check=True, timeout=60)
      self._read = ctypes.CDLL(str(library)).read_all
    self._read.argtypes = [ctypes.c_void_p, ctypes.c_long]
    self._read.restype = ctypes.c_float

  def measure(self, passes: int = 10) -> list[float]:
    """Bytes a second of each of `passes` passes."""
    if jax.default_backend() != "cpu":
      return _of_device(passes)
    parts = [np.ones((128 << 20) // self._cores, np.float32) for _ in range(self._cores)]
    rates = []
    with concurrent.futures.ThreadPoolExecutor(self._cores) as pool:
      for _ in range(passes + 1):
        start = time.perf_counter()
        list(pool.map(lambda part: self._read(part.ctypes.data, part.size), parts))
        rates.append(sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return rates[1:]


def _of_device(passes: int) -> list[float]:
  x = jnp.ones((1024, 256 << 10), jnp.float32)
  total = jax.jit(lambda x: x.sum(axis=1))
  rates = []
  for _ in range(passes + 2):
    start = time.perf_counter()
    total(x).block_until_ready()
    rates.append(x.nbytes / (time.perf_counter() - start))
  return rates[2:]
