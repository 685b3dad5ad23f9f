"""The baseline of a state from its other branches; that it is unbiased: exact_gradient_test."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.ipa import branching

baseline = jax.jit(branching.branch_baseline, static_argnums=2)


class BranchBaselineTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters(
    ("one_state", [1, 0, 0, 1], [0, 0, 0, 0], [1 / 3, 2 / 3, 2 / 3, 1 / 3]),
    ("two_states_mixed", [1, 4, 3, 8], [2, 0, 2, 0], [3, 8, 1, 4]),
    ("without_siblings", [5, 1, 3], [1, 0, 0], [0, 3, 1]),
    ("no_state_shared", [5, -1], [0, 2], [0, 0]),
    ("id_out_of_range", [1, 2, 4, 8, 16], [0, 0, 3, -1, -1], [2, 1, np.nan, np.nan, np.nan]),
  )
  def test_literals(self, returns, ids, expected):
    got = self.variant(lambda r, i: branching.branch_baseline(r, i, 3))(
      jnp.array(returns, jnp.float32), jnp.array(ids)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)

  def test_low_precision_is_summed_in_float32(self):
    """256 + 1 is 256 in bfloat16."""
    got = branching.branch_baseline(
      jnp.array([256.0, 1.0, 0.0], jnp.bfloat16), jnp.zeros(3, jnp.int32), 1
    )
    np.testing.assert_array_equal(got, [0.5, 128.0, 128.5])

  def test_shapes_are_checked(self):
    with self.assertRaises(AssertionError):
      branching.branch_baseline(jnp.ones(3), jnp.zeros(2, jnp.int32), 1)
    with self.assertRaises(AssertionError):
      branching.branch_baseline(jnp.ones((2, 2)), jnp.zeros((2, 2), jnp.int32), 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_no_branch_moves_its_own_baseline_or_another_states(seed):
  rng = np.random.default_rng(seed)
  returns, ids = rng.normal(size=7), rng.integers(0, 4, 7)
  changed = returns.copy()
  changed[0] += 10.0
  with jax.enable_x64(True):
    before, after = np.asarray(baseline(returns, ids, 4)), np.asarray(baseline(changed, ids, 4))
  siblings = (ids == ids[0]) & (np.arange(7) > 0)
  expected = np.where(siblings, 10 / max(siblings.sum(), 1), 0.0)
  np.testing.assert_allclose(after - before, expected, atol=1e-12)
  for i in range(7):
    others = [returns[j] for j in range(7) if j != i and ids[j] == ids[i]]
    np.testing.assert_allclose(before[i], np.mean(others) if others else 0.0, atol=1e-12)


def test_many_batches_by_vmap():
  returns = jnp.arange(6.0).reshape(2, 3)
  ids = jnp.array([[0, 0, 1], [1, 1, 1]])
  got = jax.vmap(lambda r, i: branching.branch_baseline(r, i, 2))(returns, ids)
  np.testing.assert_allclose(got, [[1, 0, 0], [4.5, 4, 3.5]], rtol=1e-6)
