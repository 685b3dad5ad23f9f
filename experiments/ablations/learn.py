"""Warm start and reinforcement learning on chained tasks.

A batch is `groups` instances of `group_size` episodes. On each batch the trainer makes `epochs`
updates, so that ratios move away from 1; pi_old is computed by the trainer before the first.

With so few weights, compiling costs more than running. So what all estimators share is compiled
once (play, score, step), and an estimator is only the map from log-probs to its loss's gradient
with respect to them; the chain rule does the rest.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.ablations import chain, policy
from experiments.ablations.estimators import Estimator
from rome import ipa, models

Metrics = dict[str, chex.Array]
State = tuple[chex.ArrayTree, optax.OptState]
Curves = dict[str, np.ndarray]
_KEPT = ("masked_share", "mismatch_mean", "truncated_share", "ratio_mean", "positive_share")


@dataclasses.dataclass(frozen=True)
class Settings:
  """What all arms of an ablation share; hashable, so that jit can take it as static.

  Attributes:
    groups: instances a batch.
    group_size: episodes of each.
    epochs: updates on each batch.
    iterations: batches; a multiple of `eval_every`.
    eval_every: batches from one evaluation to the next.
    eval_episodes: held-out instances an evaluation, one episode each.
    engine: what the sampler keeps its weights in, see `policy.ENGINES`.
    clip_norm: bound on the gradient's global norm; the norm that is reported is taken before.
    warm_updates, warm_rows, warm_rate: the supervised warm start.
    rightness: of the teacher whom it imitates, see `chain.Teacher`.
  """

  groups: int = 4
  group_size: int = 8
  epochs: int = 4
  iterations: int = 80
  eval_every: int = 2
  eval_episodes: int = 128
  engine: str = "float4_e2m1"
  clip_norm: float = 1.0
  warm_updates: int = 300
  warm_rows: int = 64
  warm_rate: float = 1e-2
  rightness: tuple[float, ...] = (0.95, 0.90, 0.85, 0.80, 0.75, 0.70, 0.60, 0.45)

  def __post_init__(self) -> None:
    if self.iterations < 1 or self.iterations % self.eval_every:
      raise ValueError(f"iterations must be a positive multiple of {self.eval_every}")
    if self.engine not in policy.ENGINES:
      raise ValueError(f"engine must be one of {', '.join(policy.ENGINES)}")

  @property
  def batch(self) -> int:
    """Episodes an iteration."""
    return self.groups * self.group_size


@functools.partial(jax.jit, static_argnums=(0, 1))
def warm_start(settings: Settings, horizon: int, seed: chex.Numeric) -> chex.ArrayTree:
  """Supervised learning on the teacher's episodes of training instances (Eq. 1): parameters."""
  teacher = chain.Teacher(settings.rightness)
  rate = optax.linear_schedule(settings.warm_rate, 0.0, settings.warm_updates)
  optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optax.adam(rate))
  taken = jnp.ones((settings.warm_rows, horizon), bool)
  chunk_ids = chain.chunk_layout(taken)
  key = jax.random.fold_in(jax.random.key(0), seed)
  params = models.init_params(policy.MODEL, jax.random.fold_in(key, 0))

  def update(carry: State, i: chex.Array) -> tuple[State, None]:
    params, state = carry
    draw, write = jax.random.split(jax.random.fold_in(key, i + 1))
    symbols = chain.draw_instances(draw, settings.warm_rows, horizon, held_out=False)
    tokens = chain.lay_out(symbols, chain.taught_words(write, symbols, teacher))

    def loss(params: chex.ArrayTree) -> chex.Array:
      logp = policy.token_logps(params, tokens, jnp.ones(tokens.shape, bool))
      total, weight = ipa.sft_loss(logp, chunk_ids, taken)
      return total / weight

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  carry = (params, optimizer.init(params))
  (params, _), _ = jax.lax.scan(update, carry, jnp.arange(settings.warm_updates))
  return params


@functools.partial(jax.jit, static_argnums=0)
def play(
  settings: Settings,
  params: chex.ArrayTree,
  key: chex.PRNGKey,
  symbols_BxH: chex.Array,
  starts_B: chex.Array,
) -> policy.Rollout:
  """Episodes of the sampler, whose weights are the rounded `params`."""
  weights = policy.sampler_weights(params, settings.engine)
  return policy.roll_out(weights, key, symbols_BxH, starts_B)


@jax.jit
def score(params: chex.ArrayTree, rollout: policy.Rollout) -> chex.Array:
  """The trainer's log-probs of a rollout: [B, T]."""
  return policy.token_logps(params, rollout.tokens, _real(rollout))


@functools.partial(jax.jit, static_argnums=0)
def make_batch(
  estimator: Estimator,
  rollout: policy.Rollout,
  old_logp_BxT: chex.Array,
  group_ids_B: chex.Array,
  step: chex.Numeric,
) -> ipa.ChunkBatch:
  """The rollout as the losses read it."""
  batch, horizon = rollout.taken.shape
  chunk_ids = chain.chunk_layout(rollout.taken)
  returns, positive_B = estimator.returns(rollout, group_ids_B, step)

  def per_chunk(values_B: chex.Array) -> chex.Array:
    return jnp.broadcast_to(values_B[:, None], (batch, horizon))

  return ipa.ChunkBatch(
    tokens=rollout.tokens,
    segment_ids=_real(rollout).astype(jnp.int32),
    positions=jnp.broadcast_to(jnp.arange(chunk_ids.shape[1])[None], chunk_ids.shape),
    chunk_ids=chunk_ids,
    old_logp=old_logp_BxT,
    behavior_logp=rollout.behavior_logp,
    returns=returns,
    positive=per_chunk(positive_B),
    il_mask=jnp.zeros((batch, horizon), bool),
    trajectory_ids=per_chunk(jnp.arange(batch)),
    group_ids=per_chunk(group_ids_B),
    versions=jnp.zeros((batch, horizon), jnp.int32) + step,
  )


def _real(rollout: policy.Rollout) -> chex.Array:
  start_Bx1 = jnp.ones((rollout.played.shape[0], 1), bool)
  return jnp.concatenate([start_Bx1, jnp.repeat(rollout.played, chain.STRIDE, axis=1)], axis=1)


def update_on(
  settings: Settings,
  estimator: Estimator,
  state: State,
  batch: ipa.ChunkBatch,
  rate: chex.Numeric,
) -> tuple[State, Metrics]:
  """`epochs` updates on one batch; metrics are means over them, the norm is the unclipped one."""
  history = []
  for _ in range(settings.epochs):
    pull_BxT, metrics = _pull(estimator, _score_batch(state[0], batch), batch)
    state, norm = _descend(settings, state, batch, pull_BxT, rate)
    history.append(metrics | {"grad_norm": norm})
  return state, _mean(history)


@jax.jit
def _score_batch(params: chex.ArrayTree, batch: ipa.ChunkBatch) -> chex.Array:
  return policy.token_logps(params, batch.tokens, batch.segment_ids > 0)


@functools.partial(jax.jit, static_argnums=0)
def _pull(
  estimator: Estimator, logp_BxT: chex.Array, batch: ipa.ChunkBatch
) -> tuple[chex.Array, Metrics]:
  """The gradient of the loss with respect to the log-probs, and metrics."""
  totals = ipa.loss_totals(batch)
  pull_BxT, metrics = jax.grad(
    lambda logp_BxT: estimator.loss(logp_BxT, batch, totals), has_aux=True
  )(logp_BxT)
  return pull_BxT, {name: metrics[name] for name in _KEPT}


@functools.partial(jax.jit, static_argnums=0)
def _descend(
  settings: Settings,
  state: State,
  batch: ipa.ChunkBatch,
  pull_BxT: chex.Array,
  rate: chex.Numeric,
) -> tuple[State, chex.Array]:
  """One step of Adam behind a bound on the gradient's norm; returns the norm before the bound."""
  params, opt_state = state
  _, pull_back = jax.vjp(
    lambda params: policy.token_logps(params, batch.tokens, batch.segment_ids > 0), params
  )
  (grads,) = pull_back(pull_BxT)
  updates, opt_state = _optimizer(settings, rate).update(grads, opt_state)
  return (optax.apply_updates(params, updates), opt_state), optax.tree.norm(grads)


@jax.jit
def _mean(history: list[Metrics]) -> Metrics:
  return jax.tree.map(lambda *values: jnp.stack(values).mean(), *history)


def _optimizer(settings: Settings, rate: chex.Numeric) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(settings.clip_norm), optax.adam(rate, b1=0.9, b2=0.95)
  )


def init_state(settings: Settings, params: chex.ArrayTree) -> State:
  """Parameters with a fresh optimiser."""
  return params, _optimizer(settings, 0.0).init(params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def test_success(
  settings: Settings, horizon: int, params: chex.ArrayTree, key: chex.PRNGKey
) -> chex.Array:
  """Success rate from the initial state, on freshly drawn held-out instances."""
  draw, sample = jax.random.split(key)
  symbols = chain.draw_instances(draw, settings.eval_episodes, horizon, held_out=True)
  starts = jnp.zeros(settings.eval_episodes, jnp.int32)
  return play(settings, params, sample, symbols, starts).success.mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _play_training(
  settings: Settings, horizon: int, params: chex.ArrayTree, key: chex.PRNGKey
) -> policy.Rollout:
  draw, sample = jax.random.split(key)
  symbols = chain.draw_instances(draw, settings.groups, horizon, held_out=False)
  symbols = jnp.repeat(symbols, settings.group_size, axis=0)
  return play(settings, params, sample, symbols, jnp.zeros(settings.batch, jnp.int32))


def reinforce(
  settings: Settings,
  estimator: Estimator,
  horizon: int,
  params: chex.ArrayTree,
  seed: int,
  rate: float,
) -> tuple[chex.ArrayTree, Curves]:
  """Trains a policy with one estimator, every episode from its initial state.

  Returns:
    Parameters; and curves: [iterations] of what the batches looked like, and `test_success`
    [iterations / eval_every + 1], before the first iteration and after every `eval_every`.
  """
  key = jax.random.fold_in(jax.random.key(1), seed)
  group_ids = jnp.repeat(jnp.arange(settings.groups), settings.group_size)
  state = init_state(settings, params)
  history, tests = [], []
  for step in range(settings.iterations + 1):
    train_key, test_key = step_keys(key, step)
    if step % settings.eval_every == 0:
      tests.append(test_success(settings, horizon, state[0], test_key))
    if step == settings.iterations:
      break
    rollout = _play_training(settings, horizon, state[0], train_key)
    batch = make_batch(estimator, rollout, score(state[0], rollout), group_ids, step)
    state, metrics = update_on(settings, estimator, state, batch, rate)
    history.append(metrics | {"train_success": rollout.success.mean()})
  return state[0], stack(history) | {"test_success": np.asarray(jax.device_get(tests))}


@jax.jit
def step_keys(key: chex.PRNGKey, step: chex.Numeric) -> tuple[chex.PRNGKey, chex.PRNGKey]:
  """Keys of a step's training episodes and of its evaluation."""
  train_key, test_key = jax.random.split(jax.random.fold_in(key, step))
  return train_key, test_key


def stack(history: list[Metrics]) -> Curves:
  """A list of metrics as curves on the host."""
  values = jax.device_get(history)
  return {name: np.array([metrics[name] for metrics in values]) for name in values[0]}
