"""Which trajectory is a task's expert, and what of it is imitated."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.ipa import experts as experts_lib
from rome.ipa import resampling

refresh_experts = jax.jit(experts_lib.refresh_experts)
seeds = st.integers(0, 2**32 - 1)


def best_expert(current, candidates):
  """(version, chunks, id) of a task's expert once candidates have come, in any order."""
  rank = lambda e: (-e[0], e[1])  # noqa: E731
  best = min(candidates, key=lambda e: (*rank(e), e[2]), default=None)
  if best is None or (current is not None and rank(best) >= rank(current)):
    return current
  return best


class ExpertsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_literals(self):
    state = experts_lib.ExpertState(
      expert_ids=jnp.array([-1, 7, 8, 9, -1]),
      num_chunks=jnp.array([0, 5, 5, 5, 0]),
      versions=jnp.array([-1, -1, 3, 3, -1]),  # Task 1's is a teacher's.
    )
    candidates = [  # task, success, id, chunks, version
      (0, 1, 20, 6, 3),
      (0, 1, 21, 4, 3),  # As new and shorter.
      (0, 1, 22, 2, 2),
      (0, 0, 23, 1, 9),
      (1, 1, 24, 9, 0),  # Longer, but the policy's own.
      (2, 1, 25, 1, 2),  # Stale.
      (2, 1, 26, 5, 3),  # No better than what is there.
      (3, 1, 28, 9, 4),
      (3, 1, 27, 9, 4),
      (5, 1, 29, 1, 9),  # No such task.
      (-1, 1, 30, 1, 9),
    ]
    task, success, ids, chunks, version = jnp.array(candidates).T
    got, winner = self.variant(experts_lib.refresh_experts)(
      state, task, success, ids, chunks, version
    )
    self.assertEqual(got.expert_ids.tolist(), [21, 24, 8, 27, -1])
    self.assertEqual(got.num_chunks.tolist(), [4, 9, 5, 9, 0])
    self.assertEqual(got.versions.tolist(), [3, 0, 3, 4, -1])
    self.assertEqual(winner.tolist(), [1, 4, -1, 8, -1])

  def test_a_teachers_is_taken_where_there_is_none(self):
    args = jnp.array([0]), jnp.array([True]), jnp.array([5]), jnp.array([3]), jnp.array([-1])
    got, winner = experts_lib.refresh_experts(experts_lib.no_experts(2), *args)
    assert got.expert_ids.tolist() == [5, -1] and winner.tolist() == [0, -1]

  def test_there_must_be_a_candidate(self):
    empty = jnp.zeros(0, jnp.int32)
    with self.assertRaises(AssertionError):
      experts_lib.refresh_experts(experts_lib.no_experts(3), empty, empty, empty, empty, empty)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_experts_agree_with_python_in_any_order(seed):
  rng = np.random.default_rng(seed)
  state = shuffled = experts_lib.no_experts(4)
  experts = [None] * 4
  for batch in range(4):
    task, version, chunks = rng.integers(0, [[5], [4], [4]], (3, 10)) + [[0], [-1], [1]]
    success, ids = rng.random(10) < 0.5, batch * 10 + rng.permutation(10)
    state, winner = refresh_experts(state, task, success, ids, chunks, version)
    order = rng.permutation(10)
    shuffled, other = refresh_experts(
      shuffled, task[order], success[order], ids[order], chunks[order], version[order]
    )
    offers = list(zip(version.tolist(), chunks.tolist(), ids.tolist(), strict=True))
    for n in range(4):
      mine = [offers[i] for i in np.flatnonzero((task == n) & success)]
      before, experts[n] = experts[n], best_expert(experts[n], mine)
      expected = -1 if experts[n] == before else offers.index(experts[n])
      assert winner[n] == expected
      assert other[n] == (-1 if expected < 0 else order.tolist().index(expected))
    got = zip(
      state.versions.tolist(), state.num_chunks.tolist(), state.expert_ids.tolist(), strict=True
    )
    assert list(got) == [(-1, 0, -1) if e is None else e for e in experts]
  chex.assert_trees_all_equal(state, shuffled)


class ImitationTest(chex.TestCase):
  @parameterized.parameters(
    ("always", [True, True, True, True]),
    ("only_when_no_positive", [False, True, True, False]),
    ("off", [False, False, False, False]),
  )
  def test_modes(self, il_mode, expected):
    """Task 3 has a success and a failure, task 5 two failures, task 7 no trajectory."""
    tasks, positive = jnp.array([3, 3, 5, 5]), jnp.array([False, True, False, False])
    config = resampling.ResamplingConfig(il_mode=il_mode)
    keep = jax.jit(experts_lib.imitated_experts, static_argnums=3)(
      jnp.array([3, 5, 7, 3]), tasks, positive, config
    )
    self.assertEqual(keep.tolist(), expected)

  @chex.variants(with_jit=True, without_jit=True)
  def test_prefix_and_the_chunk_after_it_are_imitated(self):
    mask = self.variant(lambda s, k: experts_lib.imitation_prefix_mask(s, k, 4))
    got = mask(jnp.array([0, 1, 2, 2, 0]), jnp.array([3, 4, 3, 1, 0]))
    np.testing.assert_array_equal(
      got.astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    )

  @chex.variants(with_jit=True, without_jit=True)
  def test_prefix_tokens_are_in_no_chunk(self):
    ids = jnp.array([[-1, 0, 0, -1, 1, 2, 2], [-1, 0, 1, -1, 1, 2, -1]])
    got = self.variant(experts_lib.drop_prefix)(ids, jnp.array([2, 0]))
    np.testing.assert_array_equal(got, [[-1, -1, -1, -1, -1, 2, 2], ids[1]])
