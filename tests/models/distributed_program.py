"""What each process of `distributed_test` runs: its share of three updates on four devices.

  python -m tests.models.distributed_program PROCESS PROCESSES PORT FILE

Process 0 writes loss and gradient norm of every update into FILE.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import optax

from rome import models
from rome.models import sharding
from tests.models import meshes

STEPS = 3


def train():
  """[[loss, gradient norm], ...] of updates on four devices, all here or not."""
  config, compute = meshes.MOE, models.Compute(experts="ragged")
  # Of two processes each has the neighbours along expert; fsdp joins the processes.
  mesh = sharding.make_mesh(fsdp=2, expert=2)
  spec = sharding.axes_spec(("batch", "length"), mesh.axis_names)
  by_row = jax.sharding.NamedSharding(mesh, spec)
  shapes = jax.eval_shape(lambda: models.init_params(config, jax.random.key(0)))
  layout = sharding.param_shardings(mesh, shapes)
  optimizer = optax.adamw(1e-2)

  def step(params, state, *rows):
    (loss, _), grads = jax.value_and_grad(meshes.loss, argnums=2, has_aux=True)(
      config, compute, params, *rows
    )
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

  with jax.set_mesh(mesh):
    init = jax.jit(lambda key: models.init_params(config, key), out_shardings=layout)
    params = init(jax.random.key(0))
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(step)
    numbers = []
    for i in range(STEPS):
      # Every process draws the whole batch and keeps the rows of its own devices.
      rows = [
        jax.make_array_from_callback(x.shape, by_row, lambda at, x=x: x[at])
        for x in meshes.batch(seed=i)
      ]
      params, state, loss, norm = step(params, state, *rows)
      numbers.append([float(loss), float(norm)])
  held = params["lm_head"]["kernel"].addressable_shards
  assert len(held) == jax.local_device_count()
  assert all(shard.data.shape == (16, 64) for shard in held)  # of 32, 64
  return numbers


def main(rank: str, count: str, port: str, path: str) -> None:
  if int(count) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
      f"127.0.0.1:{port}", int(count), int(rank), initialization_timeout=60
    )
  assert jax.process_count() == int(count)
  assert jax.device_count() == 4
  numbers = train()
  assert np.isfinite(numbers).all()
  if rank == "0":
    pathlib.Path(path).write_text(json.dumps(numbers))
  if int(count) > 1:
    jax.distributed.shutdown()


if __name__ == "__main__":
  main(*sys.argv[1:])
