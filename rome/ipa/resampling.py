"""Chunk-level initialised resampling as state machines (section 3.2.4.4, arXiv:2512.24873).

Where to start sampling on an expert trajectory, and which of its chunks are crucial. When a task
gets a new expert, and what of it is imitated, is in `rome.ipa.experts`; restoring the environment
is not done in this package.

Start s means: sampling begins after the first s chunks of the expert, so 0 is the initial state,
num_chunks - 1 leaves the last chunk to the policy, and p(s) is the success rate from there. Chunks
are counted from 0 as everywhere in this package: start s has the policy sample chunk s first, and
the paper's c*_f is chunk f - 1, which lies between starts f - 1 and f.

Suffixes: N tasks, K chunk slots of an expert, S = K + 1 starts, A anchors.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp

ANCHOR_MODES = ("uniform", "random")
IL_MODES = ("always", "only_when_no_positive", "off")


@dataclasses.dataclass(frozen=True)
class ResamplingConfig:
  """Settings of this module; hashable, so that jit can take it as static.

  Attributes:
    master_threshold: success rate of one group at which rollback leaves a start, in (0, 1].
    rollback_step: chunks that it then moves toward the initial state, >= 1.
    anchors: A, starts a task in parallelised initialisation, >= 1, the initial state included.
    anchor_mode: "uniform" spreads the anchors evenly, "random" draws them anew each iteration.
    crucial_level: significance level of the test for a crucial chunk, in (0, 0.5).
    il_mode: which experts are imitated: "always" all, "only_when_no_positive" those whose task had
      no positive trajectory in the batch, "off" none.
  """

  master_threshold: float = 0.8
  rollback_step: int = 1
  anchors: int = 4
  anchor_mode: str = "uniform"
  crucial_level: float = 0.05
  il_mode: str = "always"

  def __post_init__(self) -> None:
    for name, upper, within in (
      ("master_threshold", 1, "in (0, 1]"),
      ("crucial_level", math.nextafter(0.5, 0), "in (0, 0.5)"),
    ):
      value = getattr(self, name)
      self._require(name, type(value) in (int, float) and 0 < value <= upper, f"a number {within}")
    for name in ("rollback_step", "anchors"):
      value = getattr(self, name)
      self._require(name, type(value) is int and value >= 1, "an int >= 1")
    self._require("anchor_mode", self.anchor_mode in ANCHOR_MODES, f"one of {ANCHOR_MODES}")
    self._require("il_mode", self.il_mode in IL_MODES, f"one of {IL_MODES}")

  def _require(self, name: str, holds: bool, what: str) -> None:
    if not holds:
      raise ValueError(f"ResamplingConfig.{name} must be {what}, got {getattr(self, name)!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RollbackState:
  """Where sequential rollback stands.

  Attributes:
    pointer: int [N], the start that the task's next group samples from.
    num_chunks: int [N], chunks of the task's expert, at most K; 0 = no expert, and the task is
      sampled from its initial state.
    successes: int [N, S], successes of the latest group from each start.
    attempts: int [N, S], size of that group; 0 = never sampled from there. successes / attempts is
      p(s). Choice: the latest group and not a sum, because a sum would mix policies.
    crucial: bool [N, K], chunks that rollback found crucial when it crossed them.
    done: bool [N], whether the initial state has been mastered. Stays true.
  """

  pointer: chex.Array
  num_chunks: chex.Array
  successes: chex.Array
  attempts: chex.Array
  crucial: chex.Array
  done: chex.Array


def crucial_chunks(successes_NxS: chex.Array, attempts_NxS: chex.Array, level: float) -> chex.Array:
  """Finds the chunks f with p(f-1) significantly below p(f) (section 3.2.4.4, arXiv:2512.24873).

  One-sided two-proportion z-test with pooled variance; chunk k (from 0) is tested between starts k
  and k + 1. No correction is made for testing many chunks. The normal approximation is rough below
  about five successes and failures a side: at level 0.05, 0 of 2 against 2 of 2 counts as a drop,
  where Fisher's exact test says 0.17; with one attempt a side nothing but 1.41 sigma (0.079) can be
  reached, so nothing counts. Counts of 0 attempts are no evidence: not crucial. Two rates that are
  both 0 or both 1 are equal: not crucial.

  Args:
    successes_NxS: int, successes from every start.
    attempts_NxS: int, samples from every start. Starting after the last chunk is never sampled;
      unless counts are put there, the last chunk is never crucial.
    level: significance level, below 0.5.

  Returns:
    crucial_NxK, bool.
  """
  chex.assert_rank([successes_NxS, attempts_NxS], 2)
  chex.assert_equal_shape([successes_NxS, attempts_NxS])
  return _significantly_below(
    successes_NxS[:, :-1], attempts_NxS[:, :-1], successes_NxS[:, 1:], attempts_NxS[:, 1:], level
  )


def rollback_init(num_chunks_N: chex.Array, max_chunks: int) -> RollbackState:
  """Points every task at the last chunk of its expert; a task without one at its initial state.

  Args:
    num_chunks_N: int, chunks of each task's expert, 0 = none, at most max_chunks.
    max_chunks: K (static).
  """
  chex.assert_rank(num_chunks_N, 1)
  num_chunks_N = jnp.asarray(num_chunks_N).astype(jnp.int32)
  num_tasks = num_chunks_N.shape[0]
  return RollbackState(
    pointer=jnp.maximum(num_chunks_N - 1, 0),
    num_chunks=num_chunks_N,
    successes=jnp.zeros((num_tasks, max_chunks + 1), jnp.int32),
    attempts=jnp.zeros((num_tasks, max_chunks + 1), jnp.int32),
    crucial=jnp.zeros((num_tasks, max_chunks), bool),
    done=jnp.zeros(num_tasks, bool),
  )


def rollback_update(
  state: RollbackState,
  successes_N: chex.Array,
  attempts_N: chex.Array,
  config: ResamplingConfig,
) -> RollbackState:
  """Moves the pointers after one group a task (section 3.2.4.4, arXiv:2512.24873).

  A start is mastered when this group's success rate reaches `master_threshold`; the pointer then
  moves `rollback_step` chunks toward the initial state, and mastering that one ends the task. A
  pointer never moves back: after a drop the task stays until it masters the start.

  Choice: the drop is tested once, on the first group from a new start against the group that
  mastered the previous one, where the policy has changed least and each chunk is judged at the
  level that was set. (The mastering group was picked for its rate, so it flatters p(f) a little.) A
  step of several chunks cannot tell which of them it was, and marks all that it crossed.

  Args:
    state: as before.
    successes_N: int, successes of each task's group that was sampled from `state.pointer`.
    attempts_N: int, size of that group, whole: one call is one group. 0 leaves the task as it is,
      and is what belongs here for a group that was sampled from another start.
    config: static; reads master_threshold, rollback_step, crucial_level.
  """
  chex.assert_rank([successes_N, attempts_N, state.attempts], [1, 1, 2])
  chex.assert_equal_shape([successes_N, attempts_N, state.pointer])
  successes_N, attempts_N = (jnp.asarray(x).astype(jnp.int32) for x in (successes_N, attempts_N))
  pointer_Nx1 = jnp.asarray(state.pointer)[:, None]
  tried_N = attempts_N > 0
  index_NxS = jax.lax.broadcasted_iota(jnp.int32, state.attempts.shape, 1)
  here_NxS = index_NxS == pointer_Nx1

  # The previous start is the nearest above that has been sampled; the first start has none.
  above_NxS = (index_NxS > pointer_Nx1) & (state.attempts > 0)
  previous_Nx1 = jnp.where(above_NxS, index_NxS, index_NxS.shape[1]).min(axis=1, keepdims=True)
  previous_NxS = index_NxS == previous_Nx1
  drop_N = _significantly_below(
    successes_N,
    attempts_N,
    jnp.where(previous_NxS, state.successes, 0).sum(axis=1),
    jnp.where(previous_NxS, state.attempts, 0).sum(axis=1),
    config.crucial_level,
  )
  first_N = jnp.where(here_NxS, state.attempts, 0).sum(axis=1) == 0
  crossed_NxS = (index_NxS >= pointer_Nx1) & (index_NxS < previous_Nx1)
  crucial_NxS = crossed_NxS & (drop_N & first_N)[:, None]

  # The factor forgives rounding, as in 7 / 13 * 13 > 7, and nothing else.
  needed_N = config.master_threshold * attempts_N * (1 - 1e-6)
  mastered_N = tried_N & (successes_N >= needed_N)
  moved_N = jnp.maximum(state.pointer - config.rollback_step, 0)
  sampled_NxS = here_NxS & tried_N[:, None]
  return RollbackState(
    pointer=jnp.where(mastered_N, moved_N, state.pointer),
    num_chunks=state.num_chunks,
    successes=jnp.where(sampled_NxS, successes_N[:, None], state.successes),
    attempts=jnp.where(sampled_NxS, attempts_N[:, None], state.attempts),
    crucial=state.crucial | crucial_NxS[:, :-1],
    done=state.done | (mastered_N & (state.pointer == 0)),
  )


def rollback_refresh(
  state: RollbackState,
  replaced_N: chex.Array,
  num_chunks_N: chex.Array,
  shared_N: chex.Array,
) -> RollbackState:
  """Carries rollback over to new experts.

  Choice: an expert that was itself sampled from start s of the old one shares its first s chunks,
  so the state at every start up to s is the same and what is known there stays: pointer, counts and
  crucial chunks. What lies beyond is forgotten. Where the pointer lies beyond, or there was no
  expert, the task restarts at the last chunk, unless it was done. Without this no task would ever
  get back to its initial state: every success on the way is a new expert.

  Args:
    state: as before.
    replaced_N: bool, whether the task has a new expert.
    num_chunks_N: int, its chunks, at most K; not read elsewhere.
    shared_N: int, the start on the old expert that it was sampled from, 0 if on none; not read
      elsewhere.
  """
  chex.assert_rank([replaced_N, num_chunks_N, shared_N], 1)
  chex.assert_equal_shape([replaced_N, num_chunks_N, shared_N, state.pointer])
  replaced_N = jnp.asarray(replaced_N).astype(bool)
  num_chunks_N, shared_N = (jnp.asarray(x).astype(jnp.int32) for x in (num_chunks_N, shared_N))
  lost_N = (state.pointer > shared_N) | (state.num_chunks == 0)
  restarts_N = replaced_N & lost_N & ~jnp.asarray(state.done)
  kept_N = jnp.where(replaced_N, shared_N, state.attempts.shape[1])
  kept_N = jnp.where(restarts_N, -1, kept_N)
  index_NxS = jax.lax.broadcasted_iota(jnp.int32, state.attempts.shape, 1)
  keep_NxS = index_NxS <= kept_N[:, None]
  return RollbackState(
    pointer=jnp.where(restarts_N, jnp.maximum(num_chunks_N - 1, 0), state.pointer),
    num_chunks=jnp.where(replaced_N, num_chunks_N, state.num_chunks),
    successes=jnp.where(keep_NxS, state.successes, 0),
    attempts=jnp.where(keep_NxS, state.attempts, 0),
    crucial=state.crucial & keep_NxS[:, 1:],
    done=state.done,
  )


def anchor_starts(
  num_chunks_N: chex.Array,
  task_ids_N: chex.Array,
  iteration: chex.Numeric,
  key: chex.PRNGKey,
  config: ResamplingConfig,
) -> chex.Array:
  """Picks the starts of parallelised initialisation (section 3.2.4.4, arXiv:2512.24873).

  The first anchor is the initial state. "uniform" spreads the rest evenly up to the last chunk.
  "random" draws the rest from starts 1..num_chunks-1, every subset alike, without repetition. The
  starts ascend. Choice: an expert with fewer chunks than anchors gets every start, some more than
  once, so that a batch stays full; a task without an expert gets the initial state A times.

  Args:
    num_chunks_N: int, chunks of each task's expert, 0 = none.
    task_ids_N: int >= 0. A task's draw depends on its id, the iteration and the key, and not on its
      place in the batch.
    iteration: int >= 0.
    key: of the run; not read by "uniform".
    config: static; reads anchors, anchor_mode.

  Returns:
    starts_NxA, int32.
  """
  chex.assert_rank([num_chunks_N, task_ids_N, iteration], [1, 1, 0])
  chex.assert_equal_shape([num_chunks_N, task_ids_N])
  drawn = config.anchors - 1
  last_Nx1 = jnp.maximum(jnp.asarray(num_chunks_N).astype(jnp.int32) - 1, 0)[:, None]
  uniform_NxA = last_Nx1 * jnp.arange(config.anchors, dtype=jnp.int32)[None] // max(drawn, 1)
  if config.anchor_mode == "uniform":
    return uniform_NxA

  def draw(task_id: chex.Array, last: chex.Array) -> chex.Array:
    """Floyd's algorithm: a subset of 1..last, whose bits do not depend on how K is padded."""
    task_key = jax.random.fold_in(jax.random.fold_in(key, task_id), iteration)
    starts = [jnp.zeros_like(last)]
    for i in range(drawn):
      top = last - drawn + 1 + i
      start = jax.random.randint(jax.random.fold_in(task_key, i), (), 1, top + 1, last.dtype)
      taken = jnp.stack([start == other for other in starts]).any()
      starts.append(jnp.where(taken, top, start))
    return jnp.sort(jnp.stack(starts))

  random_NxA = jax.vmap(draw)(jnp.asarray(task_ids_N), last_Nx1[:, 0])
  return jnp.where(last_Nx1 >= drawn, random_NxA, uniform_NxA)


def _significantly_below(
  successes: chex.Array,
  attempts: chex.Array,
  next_successes: chex.Array,
  next_attempts: chex.Array,
  level: float,
) -> chex.Array:
  """One-sided pooled two-proportion z-test of H1: p < p_next; False without attempts."""
  x, n, next_x, next_n = (
    jnp.asarray(a).astype(float) for a in (successes, attempts, next_successes, next_attempts)
  )
  known = (n > 0) & (next_n > 0)
  n, next_n = jnp.maximum(n, 1), jnp.maximum(next_n, 1)
  pooled = (x + next_x) / (n + next_n)
  variance = pooled * (1 - pooled) * (1 / n + 1 / next_n)
  varies = known & (variance > 0)
  z = (next_x / next_n - x / n) / jnp.sqrt(jnp.where(varies, variance, 1))
  return varies & (jax.scipy.stats.norm.sf(z) < level)
