"""Same-state Monte-Carlo baselines: what the other rollouts from one chunk boundary brought in.

Several rollouts sampled from one chunk boundary are independent given that state, so the mean
return of the others estimates its value without a critic, and without a bias by when the policy
stops: every branch starts at the same place, however long it lasts (VinePPO, arXiv:2410.01679, and
RLOO, arXiv:2402.14740, at a state in place of a prompt).
"""

import chex
import jax
import jax.numpy as jnp

from rome.ipa.chunks import at_least_float32


def branch_baseline(
  returns_M: chex.Array, branch_state_ids_M: chex.Array, num_states: int
) -> chex.Array:
  """Mean return of the other branches from the same state: b_i = mean_{j != i, s_j = s_i} G_j.

  Taken from the returns of the chunks at and after the boundary, it leaves the expected gradient as
  it is (with gamma = 1 and `trajectory_sum`), as it depends on the state and on the other branches
  only. Not so before the boundary: the chunks that led there are common to all branches, whose
  centred returns sum to 0, and would learn nothing. Those keep a baseline of whole trajectories.

  Args:
    returns_M: float, each branch's undiscounted return from the boundary on.
    branch_state_ids_M: int, the state that each branch was sampled from, 0..num_states-1. Branches
      of one id must be independent given the state.
    num_states: bound on the ids (static).

  Returns:
    baselines_M, in at least float32. 0 for a branch without siblings (Choice: any constant keeps
    the gradient unbiased, and with 0 its return is used as it is). NaN for an id out of range,
    rather than another state's value.
  """
  chex.assert_rank([returns_M, branch_state_ids_M], 1)
  chex.assert_equal_shape([returns_M, branch_state_ids_M])
  returns_M = at_least_float32(returns_M)
  ids_M = jnp.asarray(branch_state_ids_M)
  ids_M = jnp.where((ids_M >= 0) & (ids_M < num_states), ids_M, num_states)

  def others(values_M: chex.Array) -> chex.Array:
    sums = jax.ops.segment_sum(values_M, ids_M, num_segments=num_states)
    return sums.at[ids_M].get(mode="fill", fill_value=jnp.nan) - values_M

  return others(returns_M) / jnp.maximum(others(jnp.ones_like(returns_M)), 1)
