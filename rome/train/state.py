"""The one value that a run is: parameters, optimiser, step, key."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from rome import models
from rome.models import lora
from rome.train.config import LoraConfig, StageConfig

NO_ADAPTERS = LoraConfig()
_ADAPTERS_STREAM = 5  # of randomness under a run's key; parameters take 0, see `rome.train.play`


@struct.dataclass
class TrainState:
  """Everything that an update reads and writes.

  Attributes:
    params: nested dict of float32 arrays.
    opt_state: optax state, of what trains: the adapters where there are any (`rome.models.lora`).
    step: int32 scalar, updates done in this stage.
    key: typed PRNG key of the run; never split, only folded into.
  """

  params: dict
  opt_state: optax.OptState
  step: jax.Array
  key: jax.Array


def learning_rate(config: StageConfig, count: chex.Numeric) -> jax.Array:
  """Rate of update number `count`, from 0: linear warm-up, constant, linear fall to a tenth."""
  rise = jnp.minimum(1.0, (count + 1) / max(config.warmup, 1))
  left = jnp.clip((config.steps - count) / max(config.cooldown, 1), 0.0, 1.0)
  return config.learning_rate * rise * (0.1 + 0.9 * left if config.cooldown else 1.0)


def clip_by_norm(most: float) -> optax.GradientTransformationExtraArgs:
  """`optax.clip_by_global_norm` for parts of a gradient: `update` takes the `norm` of the whole."""

  def update(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
    *,
    norm: chex.Array | None = None,
    **_: Any,
  ) -> tuple[optax.Updates, optax.OptState]:
    norm = optax.tree.norm(updates) if norm is None else norm
    clipped = jax.tree.map(lambda x: jnp.where(norm < most, x, x / norm * most), updates)
    return clipped, state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def make_optimizer(config: StageConfig) -> optax.GradientTransformationExtraArgs:
  """AdamW of one stage, with a linear warm-up and global-norm clipping.

  Its `update` takes the gradient's `norm`, and then serves for parts of a gradient; without it the
  norm is computed of what is there.
  """
  rate = functools.partial(learning_rate, config)
  return optax.chain(
    clip_by_norm(config.clip_norm),
    optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=config.weight_decay),
  )


def init_state(
  config: models.ModelConfig,
  optimizer: optax.GradientTransformation,
  seed: int,
  params: dict | None = None,
  adapters: LoraConfig = NO_ADAPTERS,
) -> TrainState:
  """A fresh state, of given parameters or random ones; all randomness follows from `seed`.

  Raises:
    ValueError: the model has no place for the adapters.
  """
  key = jax.random.key(seed)
  if params is None:
    params = jax.jit(models.init_params, static_argnums=0)(config, jax.random.fold_in(key, 0))
  if adapters.rank:
    params = models.add_lora(
      config,
      params,
      jax.random.fold_in(key, _ADAPTERS_STREAM),
      adapters.rank,
      adapters.alpha,
      adapters.targets,
    )
  return TrainState(
    params=params,
    opt_state=optimizer.init(lora.split(params)[0]),
    step=jnp.zeros((), jnp.int32),
    key=key,
  )


def restart_optimizer(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
  """The same weights at step 0 of a new stage."""
  return dataclasses.replace(
    state,
    opt_state=optimizer.init(lora.split(state.params)[0]),
    step=jnp.zeros((), jnp.int32),
  )
