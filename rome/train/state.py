"""The one value that a run is: parameters, optimiser, step, key."""

from flax import struct
import jax
import jax.numpy as jnp
import optax

from rome import models


@struct.dataclass
class TrainState:
  """Everything that an update reads and writes.

  Attributes:
    params: nested dict of float32 arrays.
    opt_state: optax state.
    step: int32 scalar, updates done in this stage.
    key: typed PRNG key of the run; never split, only folded into.
  """

  params: dict
  opt_state: optax.OptState
  step: jax.Array
  key: jax.Array


def make_optimizer(learning_rate: float, warmup_steps: int, clip_norm: float,
                   weight_decay: float) -> optax.GradientTransformation:
  """AdamW with a linear warm-up and global-norm clipping."""
  schedule = optax.linear_schedule(0.0, learning_rate, warmup_steps) if warmup_steps else learning_rate
  return optax.chain(optax.clip_by_global_norm(clip_norm),
                     optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=weight_decay))


def init_state(config: models.ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
  """A fresh state; everything random in a run follows from `seed`."""
  key = jax.random.key(seed)
  params = models.init_params(config, jax.random.fold_in(key, 0))
  return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32), key=key)


def restart_optimizer(state: TrainState, optimizer: optax.GradientTransformation) -> TrainState:
  """The same weights at step 0 of a new stage."""
  return state.replace(opt_state=optimizer.init(state.params), step=jnp.zeros((), jnp.int32))
