"""The expert trajectory of each task, as arrays (sections 3.2.4.4-5, arXiv:2512.24873).

When a task gets a new expert, which experts are imitated (Eq. 10), and which chunks of them. The
trajectories themselves are elsewhere; an expert here is an id and a few numbers.

Suffixes: N tasks, K chunk slots of an expert, M candidates, experts or rows.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from rome.ipa.resampling import ResamplingConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertState:
  """The expert trajectory of each task.

  Attributes:
    expert_ids: int [N], which stored trajectory it is, -1 = none.
    num_chunks: int [N], its chunks; 0 = none.
    versions: int [N], policy version that sampled it; -1 = none, or a teacher.
  """

  expert_ids: chex.Array
  num_chunks: chex.Array
  versions: chex.Array


def no_experts(num_tasks: int) -> ExpertState:
  """No task has an expert yet."""
  none_N = jnp.full(num_tasks, -1, jnp.int32)
  return ExpertState(expert_ids=none_N, num_chunks=jnp.zeros_like(none_N), versions=none_N)


def refresh_experts(
  state: ExpertState,
  task_ids_M: chex.Array,
  success_M: chex.Array,
  expert_ids_M: chex.Array,
  num_chunks_M: chex.Array,
  versions_M: chex.Array,
) -> tuple[ExpertState, chex.Array]:
  """Lets the policy's own verified successes replace the experts (section 3.2.4.4).

  Choice: the newer policy version wins, then fewer chunks, then the smaller id; the current expert
  takes part and keeps its place on a tie of the first two. So the policy's first success replaces a
  teacher's, stale samples do not undo a refresh, and the order of arrival changes nothing.

  Args:
    state: as before.
    task_ids_M: int, the candidate's task in 0..N-1; others are ignored. M >= 1.
    success_M: bool, whether it is a *verified* success. A caller that must not lose its rollback
      pointer leaves out those that were sampled from before it (see `rollback_refresh`).
    expert_ids_M: int >= 0, what the store calls the trajectory.
    num_chunks_M: int, all its chunks, those of the prefix included.
    versions_M: int, the policy version that sampled it, -1 for a teacher.

  Returns:
    (state, winner_N): winner_N is the candidate that became the task's expert, as an index into M,
    -1 where the expert stays.
  """
  chex.assert_rank([task_ids_M, success_M, expert_ids_M, num_chunks_M, versions_M], 1)
  chex.assert_equal_shape([task_ids_M, success_M, expert_ids_M, num_chunks_M, versions_M])
  chex.assert_axis_dimension_gt(task_ids_M, 0, 0)
  num_tasks = state.expert_ids.shape[0]
  task_ids_M, expert_ids_M, num_chunks_M, versions_M = (
    jnp.asarray(x).astype(jnp.int32) for x in (task_ids_M, expert_ids_M, num_chunks_M, versions_M)
  )
  taking_part_M = jnp.asarray(success_M).astype(bool) & (task_ids_M >= 0)
  index_M = jax.lax.iota(jnp.int32, task_ids_M.shape[0])
  # Best first; the place of a task's first candidate in this order leads to the candidate.
  *_, order_M = jax.lax.sort((-versions_M, num_chunks_M, expert_ids_M, index_M), num_keys=4)
  best_N = jax.ops.segment_min(
    jnp.where(taking_part_M[order_M], index_M, index_M.size), task_ids_M[order_M], num_tasks
  )
  candidate_N = order_M.at[best_N].get(mode="fill", fill_value=-1)

  def of_candidate(values_M: chex.Array) -> chex.Array:
    return values_M.at[jnp.maximum(candidate_N, 0)].get(mode="fill", fill_value=0)

  version_N, chunks_N = of_candidate(versions_M), of_candidate(num_chunks_M)
  better_N = (version_N > state.versions) | (
    (version_N == state.versions) & (chunks_N < state.num_chunks)
  )
  replaced_N = (candidate_N >= 0) & (better_N | (state.expert_ids < 0))
  experts = ExpertState(
    expert_ids=jnp.where(replaced_N, of_candidate(expert_ids_M), state.expert_ids),
    num_chunks=jnp.where(replaced_N, chunks_N, state.num_chunks),
    versions=jnp.where(replaced_N, version_N, state.versions),
  )
  return experts, jnp.where(replaced_N, candidate_N, -1)


def imitated_experts(
  expert_task_ids_M: chex.Array,
  task_ids_N: chex.Array,
  positive_N: chex.Array,
  config: ResamplingConfig,
) -> chex.Array:
  """Which experts enter the imitation term of Eq. 10.

  Args:
    expert_task_ids_M: int, the task of each expert.
    task_ids_N: int, the task of each trajectory of the batch.
    positive_N: bool, whether that trajectory is positive (`shaped_returns`).
    config: static; reads il_mode.

  Returns:
    keep_M, bool.
  """
  chex.assert_rank([expert_task_ids_M, task_ids_N, positive_N], 1)
  chex.assert_equal_shape([task_ids_N, positive_N])
  expert_task_ids_M = jnp.asarray(expert_task_ids_M)
  if config.il_mode != "only_when_no_positive":
    return jnp.full(expert_task_ids_M.shape, config.il_mode == "always")
  same_MxN = expert_task_ids_M[:, None] == jnp.asarray(task_ids_N)[None]
  return ~(same_MxN & jnp.asarray(positive_N).astype(bool)[None]).any(axis=1)


def imitation_prefix_mask(
  starts_M: chex.Array, num_chunks_M: chex.Array, max_chunks: int
) -> chex.Array:
  """The imitated chunks of an expert: c*_1..c*_f, the prefilled ones and the crucial one (Eq. 10).

  Choice: f is the chunk that sampling starts with, whether or not the test has called it crucial
  yet: Eq. 10 reinforces "from f on", and there a task gets stuck before there is evidence. A task
  with several starts passes the largest, because prefixes nest and each expert enters once.

  Args:
    starts_M: int, the start on each expert.
    num_chunks_M: int, its chunks.
    max_chunks: K (static).

  Returns:
    mask_MxK, bool; all False for num_chunks 0.
  """
  chex.assert_rank([starts_M, num_chunks_M], 1)
  chex.assert_equal_shape([starts_M, num_chunks_M])
  starts_M, num_chunks_M = jnp.asarray(starts_M), jnp.asarray(num_chunks_M)
  index_MxK = jax.lax.broadcasted_iota(jnp.int32, (starts_M.shape[0], max_chunks), 1)
  return (index_MxK <= starts_M[:, None]) & (index_MxK < num_chunks_M[:, None])


def drop_prefix(chunk_ids_BxT: chex.Array, starts_B: chex.Array) -> chex.Array:
  """Takes the prefilled chunks out of the loss, in rows that hold one trajectory from its start.

  Ids of the others stay, so that they still name their slots in the [B, C] arrays of the batch.

  Args:
    chunk_ids_BxT: int, -1 outside chunks, else 0..C-1 in the order of the trajectory.
    starts_B: int, the start that the row was sampled from; 0 drops nothing.

  Returns:
    chunk_ids_BxT with -1 at tokens of chunks before the start.
  """
  chex.assert_rank([chunk_ids_BxT, starts_B], [2, 1])
  chex.assert_equal_shape_prefix([chunk_ids_BxT, starts_B], 1)
  return jnp.where(chunk_ids_BxT >= jnp.asarray(starts_B)[:, None], chunk_ids_BxT, -1)
