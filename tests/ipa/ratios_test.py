"""Eq. 8: chunk ratios, the mismatch mask, the truncated weight."""

import math

import chex
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

from rome import ipa


def log_ratio_of(differences, ids=None):
  """Log-ratio of log-probs that differ by `differences`, over one chunk or by `ids`."""
  logp = jnp.array([differences], jnp.float32)
  ids = jnp.zeros(logp.shape, jnp.int32) if ids is None else jnp.array([ids])
  return ipa.chunk_log_ratio(logp, jnp.zeros_like(logp), ids, int(ids.max()) + 1)


class ChunkLogRatioTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True)
  def test_geometric_mean_by_chunk(self):
    logp = jnp.array([[-1.0, -1.0, -9.0, -0.5, -2.0], [-1.0, -3.0, 0.0, 0.0, 0.0]])
    other = jnp.array([[-1.1, -1.3, 5.0, -0.1, -1.8], [-1.0, -1.0, 0.0, 0.0, 0.0]])
    ids = jnp.array([[0, 0, -1, 1, 1], [0, 2, -1, -1, -1]])
    got = self.variant(lambda a, b: ipa.chunk_log_ratio(a, b, ids, 3))(logp, other)
    np.testing.assert_allclose(got, [[0.2, -0.3, 0.0], [0.0, 0.0, -2.0]], rtol=1e-6)

  def test_spec_vectors(self):
    up, down = log_ratio_of([0.1, 0.3]), log_ratio_of([-0.4, -0.2])
    np.testing.assert_allclose(jnp.exp(up), [[1.2214028]], rtol=1e-6)  # e^0.2
    np.testing.assert_allclose(jnp.exp(down), [[0.740818]], rtol=1e-6)  # e^-0.3
    negative = jnp.array([[False]])
    np.testing.assert_array_equal(ipa.truncated_weight(up, negative), [[1.0]])
    np.testing.assert_allclose(ipa.truncated_weight(down, negative), [[0.740818]], rtol=1e-6)
    np.testing.assert_array_equal(ipa.truncated_weight(down, ~negative), [[1.0]])

  def test_one_token_chunks_have_their_tokens_ratio(self):
    differences = [0.4, -0.9, -0.2]
    log_ratio = log_ratio_of(differences, ids=[0, 1, 2])
    np.testing.assert_allclose(log_ratio, [differences], rtol=1e-6)
    weights = ipa.truncated_weight(log_ratio, jnp.zeros((1, 3), bool))
    np.testing.assert_allclose(weights, [[1.0, 0.4066, 0.8187]], atol=5e-5)
    for upper in (0.5, 1.0, 1.2, 2.0):
      token_mask = [math.exp(d) <= upper for d in differences]
      np.testing.assert_array_equal(ipa.mismatch_mask(log_ratio, 0.0, upper), [token_mask])

  def test_one_chunk_weighs_its_tokens_alike(self):
    weight = ipa.truncated_weight(log_ratio_of([0.4, -0.9, -0.2]), jnp.zeros((1, 1), bool))
    np.testing.assert_allclose(weight, [[0.7919]], atol=5e-5)  # e^(-0.7/3)

  def test_equal_inputs_give_exactly_zero(self):
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16):
      logp = jnp.asarray(-rng.exponential(3.0, (4, 257)), dtype)
      ids = jnp.asarray(rng.integers(-1, 5, (4, 257)))
      log_ratio = ipa.chunk_log_ratio(logp, logp, ids, 5)
      assert float(jnp.abs(jnp.exp(log_ratio) - 1).max()) == 0
      assert log_ratio.dtype == jnp.float32

  def test_ratios_do_not_overflow_the_weight(self):
    weights = ipa.truncated_weight(jnp.array([[500.0, -500.0]]), jnp.zeros((1, 2), bool))
    np.testing.assert_array_equal(weights, [[1.0, 0.0]])


class MismatchMaskTest(chex.TestCase):
  # One token in 20 with pi_old/mu = e^2: e^0.1 = 1.10517 over the chunk.
  @parameterized.parameters((2.0, True), (1.2, True), (1.1, False), (math.inf, True))
  def test_one_odd_token_in_a_chunk(self, upper, kept):
    log_ratio = log_ratio_of([2.0] + [0.0] * 19)
    np.testing.assert_allclose(jnp.exp(log_ratio), [[1.10517]], rtol=1e-5)
    np.testing.assert_array_equal(ipa.mismatch_mask(log_ratio, 0.0, upper), [[kept]])

  @chex.variants(with_jit=True, without_jit=True)
  def test_band(self):
    log_ratio = jnp.log(jnp.array([[0.4, 0.6, 1.0, 1.9, 2.1, 1e-30]]))
    upper_only = self.variant(lambda x: ipa.mismatch_mask(x, 0.0, 2.0))(log_ratio)
    np.testing.assert_array_equal(upper_only, [[True, True, True, True, False, True]])
    band = self.variant(lambda x: ipa.mismatch_mask(x, 0.5, 2.0))(log_ratio)
    np.testing.assert_array_equal(band, [[False, True, True, True, False, False]])

  def test_identical_engines_are_never_masked(self):
    """At H = 1 exactly: the bound itself is inside."""
    assert bool(ipa.mismatch_mask(log_ratio_of([0.0] * 7), 1.0, 1.0).all())
