"""Where a run's arrays lie: on one device, or over the mesh of all devices of all processes.

Every process runs the same program on the same global batch (SPMD). Parameters and optimiser state
are laid out by the rules of `rome.models.sharding`, micro-batches by rows, and the compiler does
the rest; without a mesh nothing here does anything, and one device computes what it always did.

Choice: generation and checkpoints see whole arrays. An engine has all weights on the first device
of its process, so a model has to fit there; a restored state is read whole by every process and
then split. Left out: engines that are split over devices, and pipelines.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rome import ipa, models
from rome.models import sharding
from rome.train import optimise
from rome.train.config import ConfigError, RunConfig
from rome.train.state import TrainState


def mesh_of(config: RunConfig, model: models.ModelConfig) -> Mesh | None:
  """The mesh that a run of this model trains on; None for one device.

  Raises:
    ConfigError: it does not fit the devices, the processes, the model or the micro-batches.
  """
  mesh, have, processes = config.mesh, jax.device_count(), jax.process_count()
  sizes = {
    "data": mesh.data,
    "fsdp": mesh.fsdp,
    "expert": mesh.expert,
    "context": mesh.context,
    "tensor": mesh.tensor,
  }
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = -1 in sizes.values()
  count = have // fixed * fixed if free else fixed
  shown = " * ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "1 device"
  if not 1 <= count <= have:
    raise ConfigError(
      f"config.mesh wants {fixed} devices ({shown}), and there are {have}; lower it, or start more "
      "processes"
    )
  if processes > 1 and count != have:
    raise ConfigError(
      f"config.mesh must use all {have} devices of {processes} processes, got {shown}; try "
      "--config.mesh.data=-1"
    )
  for name in ("filter_groups", "max_staleness"):
    if processes > 1 and getattr(config.rl, name):
      raise ConfigError(
        f"config.rl.{name} is for one process, and this run has {processes}: what a batch holds "
        "would depend on how its groups are shared out"
      )
  if count == 1:
    return None
  made = sharding.make_mesh(**sizes, devices=jax.devices()[:count])
  parts = sharding.split_count("batch", made)
  for stage, rows in (("sft", config.sft.micro_rows), ("rl", config.rl.micro_rows)):
    if rows % parts:
      raise ConfigError(
        f"config.{stage}.micro_rows must be a multiple of {parts} (mesh.data * mesh.fsdp * "
        f"mesh.expert), got {rows}"
      )
  try:
    sharding.check_mesh(model, made, parts, config.row_length)
  except ValueError as error:
    raise ConfigError(f"config.mesh: {error}") from None
  return made


class Placement:
  """The layout of one run.

  Raises:
    ConfigError: see `mesh_of`.
  """

  def __init__(self, config: RunConfig, model: models.ModelConfig):
    self.mesh = mesh_of(config, model)
    self._offload = config.offload_optimizer

  def use(self) -> contextlib.AbstractContextManager:
    """The block computes on the mesh."""
    return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

  def lay_out(self, make: Callable[..., TrainState], *args: Any) -> TrainState:
    """What `make(*args)` returns, laid out as a run of these settings keeps it."""
    state = self._on_mesh(make, *args) if self.mesh else make(*args)
    return optimise.to_host(state) if self._offload else state

  def _on_mesh(self, make: Callable[..., TrainState], *args: Any) -> TrainState:
    """What `make(*args)` returns, made where it will lie."""
    assert self.mesh is not None
    # What lies on a device of this process alone is the same in all.
    args = jax.tree.map(lambda x: np.asarray(x) if _alone(x) else x, args)
    shapes = jax.eval_shape(make, *args)
    everywhere: Any = NamedSharding(self.mesh, PartitionSpec())
    layout = TrainState(
      params=sharding.param_shardings(self.mesh, shapes.params),
      opt_state=sharding.param_shardings(self.mesh, shapes.opt_state),
      step=everywhere,
      key=everywhere,
    )
    with self.use():
      return jax.jit(make, out_shardings=layout)(*args)


def on_devices(micro_batches: list[ipa.ChunkBatch]) -> list[ipa.ChunkBatch]:
  """Micro-batches of numpy arrays that all processes have, on the mesh in use or on one device.

  On a mesh each process keeps the rows of its own devices.
  """
  if not sharding.in_use():
    return jax.device_put(micro_batches)
  mesh, tokens = jax.sharding.get_mesh(), micro_batches[0].tokens.shape

  def put(x: np.ndarray) -> jax.Array:
    spec = sharding.axes_spec(("batch", "length" if x.shape == tokens else None), mesh.axis_names)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda at: x[at])

  return jax.tree.map(put, micro_batches)


def local(tree: chex.ArrayTree) -> chex.ArrayTree:
  """The same arrays, each whole on this process's first device; those on one device stay there.

  All processes have to call it together.
  """
  return jax.tree.map(lambda x: x if _alone(x) else _gathered(x).addressable_data(0), tree)


def whole(x: chex.Array) -> np.ndarray:
  """An array as numpy; all processes have to call it together."""
  far = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
  return np.asarray(_gathered(x) if far else x)


def at_hand(x: chex.Array) -> chex.Array:
  """An array as numpy, or as it is where other processes hold parts of it."""
  return x if isinstance(x, jax.Array) and not x.is_fully_addressable else np.asarray(x)


def put_like(x: np.ndarray, like: jax.Array) -> jax.Array:
  """An array that all processes have, laid out as `like` is."""
  if _alone(like):
    return jax.device_put(x, like.sharding) if like.committed else jnp.asarray(x)
  return jax.make_array_from_callback(x.shape, like.sharding, lambda at: x[at])


def _alone(x: chex.Array) -> bool:
  return not isinstance(x, jax.Array) or len(x.sharding.device_set) == 1


def _same(x: jax.Array) -> jax.Array:
  return x


def _gathered(x: jax.Array) -> jax.Array:
  """The whole array on every device of its mesh."""
  assert isinstance(x.sharding, NamedSharding), x.sharding
  return jax.jit(_same, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
