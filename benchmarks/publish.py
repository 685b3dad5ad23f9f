"""What new weights cost an engine of one device: one JSON line.

  python -m benchmarks.publish [--preset=bench_small] [--repeats=8]

Seconds of `EnginePool.publish` while nothing runs, from parameters on the device until the weights
are ready for generation.
"""

import json
import os
import statistics
import time

import jax
from absl import app, flags

from rome import models
from rome.rollout.engine.pool import EnginePool
from rome.train.summary import provenance

_PRESET = flags.DEFINE_enum("preset", "bench_small", sorted(models.PRESETS), "The model.")
_REPEATS = flags.DEFINE_integer("repeats", 8, "Publications.", lower_bound=1)


def main(_: list[str]) -> None:
  config = models.PRESETS[_PRESET.value]
  params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.key(0))
  pool = EnginePool(config, jax.devices()[:1], slots=16, max_length=512)
  seconds = []
  for version in range(_REPEATS.value + 1):  # the first one compiles
    jax.block_until_ready(params)
    start = time.perf_counter()
    pool.publish(params, version)
    (engine,) = pool._engines.values()
    jax.block_until_ready(engine._weights[version])
    seconds.append(time.perf_counter() - start)
  print(
    json.dumps(
      {
        "benchmark": "publish",
        "preset": _PRESET.value,
        "seconds": round(statistics.median(seconds[1:]), 4),
        "all": [round(s, 4) for s in seconds[1:]],
        "seed": 0,
        **provenance(),
        "load_1min": round(os.getloadavg()[0], 2),
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
