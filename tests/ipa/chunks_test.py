"""Segmenting rows into chunks, summing over chunks, spreading over tokens."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from rome import ipa

segment = jax.jit(ipa.segment_chunks)


def numbered_in_order(sampled, calls):
  """What segment_chunks promises, by a dictionary."""
  out = np.full(sampled.shape, -1)
  for row in range(len(sampled)):
    seen = {}
    for t in np.flatnonzero(sampled[row]):
      out[row, t] = seen.setdefault(calls[row, t], len(seen))
  return out


class SegmentChunksTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  @parameterized.named_parameters(
    ("prompts_between", [0, 1, 1, 0, 0, 1], [-1, 0, 0, -1, -1, 1], [-1, 0, 0, -1, -1, 1]),
    ("adjacent_calls", [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 2, -1], [0, 0, 1, 1, 2, -1]),
    ("ids_of_their_own", [1, 0, 1, 1, 0, 1], [9, 0, 4, 4, 0, 700], [0, -1, 1, 1, -1, 2]),
    ("one_call_with_a_hole", [1, 0, 1, 0, 1, 1], [3, 3, 3, -1, 3, 8], [0, -1, 0, -1, 0, 1]),
    ("calls_interleaved", [1, 1, 1, 1, 1, 1], [5, 2, 5, 2, 7, 5], [0, 1, 0, 1, 2, 0]),
    ("nothing_sampled", [0] * 6, [0, 0, 1, 1, 2, 2], [-1] * 6),
    ("sampled_by_no_call", [1, 1, 0, 0, 0, 0], [-1, 4, 4, 4, 4, 4], [-1, 0, -1, -1, -1, -1]),
  )
  def test_literals(self, sampled, calls, expected):
    got = self.variant(ipa.segment_chunks)(np.array([sampled]) > 0, np.array([calls]))
    np.testing.assert_array_equal(got, [expected])
    assert got.dtype == jnp.int32

  def test_shapes_are_checked(self):
    with self.assertRaises(AssertionError):
      ipa.segment_chunks(jnp.ones((2, 3), bool), jnp.ones((2, 4), int))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_segmenting_random_rows(seed):
  rng = np.random.default_rng(seed)
  sampled = rng.random((4, 12)) < rng.choice([0.0, 0.3, 0.8, 1.0])
  calls = rng.integers(0, 5, (4, 12)).astype(np.int32)
  got = segment(sampled, calls)
  np.testing.assert_array_equal(got, numbered_in_order(sampled, calls))
  # Each row is what it would be alone.
  alone = [segment(sampled[i : i + 1], calls[i : i + 1]) for i in range(4)]
  np.testing.assert_array_equal(got, np.concatenate(alone))


class SumsTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_sums_lengths_and_spreading(self):
    ids = jnp.array([[0, 0, -1, 1], [-1, 2, 0, 2], [-1, -1, -1, -1]])
    values = jnp.array([[1.0, 2.0, jnp.nan, 4.0], [jnp.inf, 5.0, 6.0, 7.0], [jnp.nan] * 4])
    sums = self.variant(lambda v, i: ipa.chunk_sums(v, i, 3))(values, ids)
    np.testing.assert_array_equal(sums, [[3, 4, 0], [6, 0, 12], [0, 0, 0]])
    lengths = self.variant(lambda i: ipa.chunk_lengths(i, 3))(ids)
    np.testing.assert_array_equal(lengths, [[2, 1, 0], [1, 0, 2], [0, 0, 0]])
    spread = self.variant(ipa.spread_to_tokens)(jnp.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]), ids)
    np.testing.assert_array_equal(spread, [[1, 1, 0, 2], [0, 6, 4, 6], [0, 0, 0, 0]])

  def test_the_gradient_of_sums_is_the_spreading(self):
    ids = jnp.array([[0, 0, -1, 1], [-1, 2, 0, 2]])
    weights = jnp.array([[1.0, 2, 3], [4, 5, 6]])
    values = jnp.array([[1.0, 2, jnp.nan, 4], [jnp.nan, 5, 6, 7]])
    grad = jax.grad(lambda v: (ipa.chunk_sums(v, ids, 3) * weights).sum())(values)
    np.testing.assert_array_equal(grad, ipa.spread_to_tokens(weights, ids))

  def test_low_precision_sums_in_float32(self):
    """256 + 1 is 256 in bfloat16."""
    values = jnp.array([[256.0, 1.0]], jnp.bfloat16)
    np.testing.assert_array_equal(ipa.chunk_sums(values, jnp.array([[0, 0]]), 1), [[257.0]])
