"""Reinforcement learning with chosen start states on a fixed set of tasks (section 3.2.4.4).

Every task has an expert: its right words, which the environment rewards. All arms use the estimator
IPA, the same number of sampled episodes and the same warm start; they differ in where episodes
start and in whether experts are imitated.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from experiments.ablations import chain, estimators, learn
from rome import ipa

STARTS = ("initial", "rollback", "parallel")
IMITATED = ("nothing", "prefix", "everything")
_EVAL_REPEATS = 16  # episodes of each task, from its initial state, an evaluation


@dataclasses.dataclass(frozen=True)
class Arm:
  """One arm.

  Attributes:
    starts: "initial"; "rollback", sequential; or "parallel", several anchors at once.
    imitated: what of each task's expert enters the imitation term of Eq. 10: nothing; the prefix up
      to the chunk that sampling starts with; or everything, which is cloning and no resampling.
    label: what figures call it.
  """

  starts: str
  imitated: str
  label: str

  def __post_init__(self) -> None:
    if self.starts not in STARTS or self.imitated not in IMITATED:
      raise ValueError(f"unknown starts {self.starts!r} or imitated {self.imitated!r}")


ARMS = {
  "naive": Arm("initial", "nothing", "initial state only"),
  "rollback": Arm("rollback", "nothing", "sequential rollback"),
  "rollback_il": Arm("rollback", "prefix", "sequential rollback + imitation (Eq. 10)"),
  "parallel": Arm("parallel", "nothing", "parallel initialisation"),
  "parallel_il": Arm("parallel", "prefix", "parallel initialisation + imitation (Eq. 10)"),
  "cloning": Arm("initial", "everything", "initial state + imitation of whole experts"),
}


@functools.partial(jax.jit, static_argnums=0)
def _with_experts(
  config: ipa.IPAConfig, batch: ipa.ChunkBatch, symbols_NxH: chex.Array, mask_NxH: chex.Array
) -> ipa.ChunkBatch:
  """The batch with each expert once, as a row of its own, imitated where the mask says."""
  experts = _expert_rows(config, symbols_NxH, mask_NxH, first_id=batch.tokens.shape[0])
  return jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)]), batch, experts)


def _expert_rows(
  config: ipa.IPAConfig, symbols_NxH: chex.Array, mask_NxH: chex.Array, first_id: int
) -> ipa.ChunkBatch:
  """Rows of experts: K and R of their returns are the expert's own."""
  num, horizon = symbols_NxH.shape
  tokens = chain.lay_out(symbols_NxH, chain.right_words(symbols_NxH))
  rewards = jnp.zeros((num, horizon)).at[:, -1].set(1.0)
  returns = ipa.discounted_chunk_returns(rewards, jnp.full(num, horizon), config.gamma)
  ids = jnp.broadcast_to(jnp.arange(num)[:, None], (num, horizon))
  return ipa.ChunkBatch(
    tokens=tokens,
    segment_ids=jnp.ones_like(tokens),
    positions=jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape),
    chunk_ids=chain.chunk_layout(mask_NxH),
    old_logp=jnp.full(tokens.shape, jnp.nan),
    behavior_logp=jnp.full(tokens.shape, jnp.nan),
    returns=returns,
    positive=jnp.ones((num, horizon), bool),
    il_mask=jnp.ones((num, horizon), bool),
    trajectory_ids=first_id + ids,
    group_ids=ids,
    versions=jnp.full((num, horizon), -1),
  )


def _starts(
  arm: Arm,
  config: ipa.ResamplingConfig,
  rollback: ipa.RollbackState,
  size: int,
  step: int,
  key: chex.PRNGKey,
) -> chex.Array:
  """The start of every task's episodes: [N, size]."""
  num = len(rollback.pointer)
  if arm.starts == "rollback":
    starts_NxA = rollback.pointer[:, None]
  elif arm.starts == "parallel":
    task_ids_N = jnp.arange(num)
    starts_NxA = ipa.anchor_starts(rollback.num_chunks, task_ids_N, step, key, config)
  else:
    starts_NxA = jnp.zeros((num, 1), jnp.int32)
  return jnp.repeat(starts_NxA, size // starts_NxA.shape[1], axis=1)


def _imitated(arm: Arm, starts_NxG: chex.Array, lengths_N: chex.Array, horizon: int) -> chex.Array:
  """The imitated chunks of each expert: bool [N, H]."""
  if arm.imitated == "prefix":
    return ipa.imitation_prefix_mask(starts_NxG.max(axis=1), lengths_N, horizon)
  return jnp.full((len(lengths_N), horizon), arm.imitated == "everything")


@functools.partial(jax.jit, static_argnums=0)
def _by_task(
  settings: learn.Settings, params: chex.ArrayTree, key: chex.PRNGKey, symbols_NxH: chex.Array
) -> chex.Array:
  """Success rate of each task from its initial state: [N]."""
  num = symbols_NxH.shape[0]
  symbols = jnp.repeat(symbols_NxH, _EVAL_REPEATS, axis=0)
  starts = jnp.zeros(num * _EVAL_REPEATS, jnp.int32)
  rollout = learn.play(settings, params, key, symbols, starts)
  return rollout.success.reshape(num, -1).mean(axis=1)


_update_rollback = jax.jit(ipa.rollback_update, static_argnums=3)


def reinforce(
  settings: learn.Settings,
  config: ipa.ResamplingConfig,
  arm: Arm,
  horizon: int,
  params: chex.ArrayTree,
  seed: int,
  rate: float,
) -> tuple[chex.ArrayTree, learn.Curves]:
  """Trains a policy on `settings.groups` tasks, one group of each an iteration.

  Returns:
    Parameters; and curves. [iterations]: those of `learn.reinforce`, where train_success is from
    wherever the episodes started, and start (their mean start) and crucial (chunks that rollback
    has found crucial). [iterations / eval_every + 1]: task_success and min_task_success from the
    initial states of the tasks, test_success on held-out instances.
  """
  num, size = settings.groups, settings.group_size
  chunk = estimators.ESTIMATORS["ipa"]
  il = 0.0 if arm.imitated == "nothing" else ipa.IPAConfig().lambda_il
  estimator = dataclasses.replace(chunk, config=dataclasses.replace(chunk.config, lambda_il=il))
  key = jax.random.fold_in(jax.random.key(2), seed)
  tasks_NxH = chain.draw_instances(key, num, horizon, held_out=False)
  symbols_BxH = jnp.repeat(tasks_NxH, size, axis=0)
  lengths_N, group_ids_B = jnp.full(num, horizon), jnp.repeat(jnp.arange(num), size)
  rollback = ipa.rollback_init(lengths_N, horizon)
  state = learn.init_state(settings, params)
  history, tests = [], []
  for step in range(settings.iterations + 1):
    train_key, test_key = learn.step_keys(key, step)
    if step % settings.eval_every == 0:
      by_task = np.asarray(_by_task(settings, state[0], test_key, tasks_NxH))
      held_out = learn.test_success(settings, horizon, state[0], test_key)
      tests.append((by_task.mean(), by_task.min(), float(held_out)))
    if step == settings.iterations:
      break
    starts_NxG = _starts(arm, config, rollback, size, step, key)
    rollout = learn.play(settings, state[0], train_key, symbols_BxH, starts_NxG.reshape(-1))
    old_logp = learn.score(state[0], rollout)
    batch = learn.make_batch(estimator, rollout, old_logp, group_ids_B, step)
    mask_NxH = _imitated(arm, starts_NxG, lengths_N, horizon)
    batch = _with_experts(estimator.config, batch, tasks_NxH, mask_NxH)
    state, metrics = learn.update_on(settings, estimator, state, batch, rate)
    metrics |= {"train_success": rollout.success.mean(), "start": starts_NxG.mean()}
    if arm.starts == "rollback":
      successes_N = rollout.success.reshape(num, size).sum(axis=1)
      rollback = _update_rollback(rollback, successes_N, jnp.full(num, size), config)
    history.append(metrics | {"crucial": rollback.crucial.sum()})
  names = ("task_success", "min_task_success", "test_success")
  curves = dict(zip(names, np.array(tests).T, strict=True))
  return state[0], learn.stack(history) | curves
