"""What a checkpoint costs the run that makes it: prints one JSON line.

  python -m benchmarks.checkpoint [--model=tiny --saves=10]

State and expert store of the quickstart. `plain_ms` is what a save took when the run waited for it
(hash, then orbax's save), `blocked_ms` how long `Checkpoints.save` keeps its caller, `whole_ms` how
long until the checkpoint is complete and read back. `extra_ms` is how much longer matrix products
on all cores take with a save at their beginning than without: the thread and the run share cores.
Medians; the whole is measured side by side, in turns.
"""

import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from orbax.checkpoint.experimental import v1 as orbax

from experiments.configs import quickstart
from rome import models, rollout
from rome.train import config as config_lib
from rome.train import state as state_lib
from rome.train.checkpoints import Checkpoints, tree_sha256
from rome.train.summary import provenance

_MODEL = flags.DEFINE_enum("model", "tiny", sorted(models.PRESETS), "Preset.")
_SAVES = flags.DEFINE_integer("saves", 10, "How many of each kind.", lower_bound=1)
_PRODUCTS = 40  # after each save


def seconds(work: Callable[[], None]) -> float:
  start = time.perf_counter()
  work()
  return time.perf_counter() - start


def products(square: jax.Array) -> None:
  """Work that keeps every core busy, as an update does."""
  for _ in range(_PRODUCTS):
    jnp.dot(square, square).block_until_ready()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unknown argument {argv[1]!r}")
  logging.set_verbosity(logging.FATAL)
  config = config_lib.from_config_dict(quickstart.get_config())
  optimizer = state_lib.make_optimizer(config.rl)
  state = state_lib.init_state(models.PRESETS[_MODEL.value], optimizer, config.seed)
  store = rollout.ExpertStore(config.experts.capacity, config.agent.context).arrays()
  plain = state.replace(key=jax.random.key_data(state.key))
  plain = {"state": jax.tree.leaves(plain), "store": store}
  square = jnp.ones((1024, 1024))
  products(square)
  found: dict[str, list[float]] = {n: [] for n in ("plain", "blocked", "whole", "idle", "busy")}
  with tempfile.TemporaryDirectory(prefix="rome-bench-") as directory:
    checkpoints = Checkpoints(directory, config.keep_checkpoints)

    def synchronous(step: int) -> None:
      arrays = jax.tree.map(np.asarray, plain)
      cursor = {"state_sha256": tree_sha256(arrays)}
      path = pathlib.Path(directory, f"plain{step}")
      orbax.save_checkpointables(path, {"state": arrays, "cursor": cursor}, overwrite=True)

    for step in range(_SAVES.value):
      found["plain"].append(seconds(lambda step=step: synchronous(step)))
      start = time.perf_counter()
      checkpoints.save(2 * step, state, store, {})
      found["blocked"].append(time.perf_counter() - start)
      checkpoints.wait()
      found["whole"].append(time.perf_counter() - start)
      found["idle"].append(seconds(lambda: products(square)))
      checkpoints.save(2 * step + 1, state, store, {})
      found["busy"].append(seconds(lambda: products(square)))
      found["busy"][-1] += found["blocked"][-1]
      checkpoints.wait()
    checkpoints.close()
  ms = {name: round(1e3 * statistics.median(values), 1) for name, values in found.items()}
  row = {"benchmark": "checkpoint", "model": _MODEL.value, "saves": _SAVES.value}
  row |= {"mb": round(sum(x.nbytes for x in jax.tree.leaves(plain)) / 1e6, 1)}
  row |= {f"{name}_ms": ms[name] for name in ("plain", "blocked", "whole")}
  row |= {"products_ms": ms["idle"], "extra_ms": round(ms["busy"] - ms["idle"], 1)}
  row |= {"seed": config.seed, **provenance(), "load_1min": round(os.getloadavg()[0], 2)}
  print(json.dumps(row), flush=True)


if __name__ == "__main__":
  app.run(main)
