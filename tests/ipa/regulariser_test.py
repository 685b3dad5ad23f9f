"""The KL penalty and the entropy bonus of `ipa_loss`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome import ipa
from tests.ipa import oracle

SHAPE = (8, 32, 6)
loss_and_grads = jax.jit(
  jax.value_and_grad(ipa.ipa_loss, argnums=(0, 4), has_aux=True), static_argnums=2
)


def draw(seed):
  """A random batch with a reference and entropies, both NaN outside reinforced chunks."""
  logp, batch = oracle.random_batch(seed, *SHAPE, np.float64)
  rng = np.random.default_rng(seed)
  ref = logp + rng.normal(size=logp.shape)
  entropy = rng.exponential(size=logp.shape)
  inside = batch.chunk_ids >= 0
  imitated = np.take_along_axis(batch.il_mask, np.maximum(batch.chunk_ids, 0), axis=1)
  ref[~inside | imitated] = entropy[~inside | imitated] = np.nan
  return logp, dataclasses.replace(batch, ref_logp=ref), entropy


def z_of(batch, normaliser):
  """Z of every reinforced token, from the definitions of spec section 4: {(row, token): Z}."""
  chunks, by_trajectory = {}, {}
  for row, token in zip(*np.nonzero(batch.chunk_ids >= 0), strict=True):
    slot = batch.chunk_ids[row, token]
    if not batch.il_mask[row, slot]:
      chunks.setdefault((row, slot), []).append(token)
  for (row, slot), tokens in chunks.items():
    name = batch.trajectory_ids[row, slot]
    by_trajectory[name] = by_trajectory.get(name, 0) + len(tokens)
  return {
    (row, t): {
      "token_mean": sum(by_trajectory.values()),
      "trajectory_sum": len(by_trajectory),
      "chunk_mean": len(chunks) * len(tokens),
      "trajectory_mean": len(by_trajectory) * by_trajectory[batch.trajectory_ids[row, slot]],
    }[normaliser]
    for (row, slot), tokens in chunks.items()
    for t in tokens
  }


@pytest.mark.slow
@pytest.mark.parametrize("normaliser", ipa.NORMALISERS)
@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_agrees_with_the_definition(normaliser, seed):
  logp, batch, entropy = draw(seed)
  plain = ipa.IPAConfig(normaliser=normaliser)
  config = dataclasses.replace(plain, kl_weight=0.3, entropy_weight=0.7)
  with jax.enable_x64(True):
    base, (base_grad, _) = loss_and_grads(logp, batch, plain, None, entropy)
    (loss, metrics), (grad, entropy_grad) = loss_and_grads(logp, batch, config, None, entropy)
  expected, expected_grad = 0.0, np.zeros(logp.shape)
  expected_entropy_grad = np.zeros(logp.shape)
  for at, z in z_of(batch, normaliser).items():
    gap = logp[at] - batch.ref_logp[at]
    expected += (0.3 * gap * gap / 2 - 0.7 * entropy[at]) / z
    expected_grad[at], expected_entropy_grad[at] = 0.3 * gap / z, -0.7 / z
  np.testing.assert_allclose(loss - base[0], expected, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(metrics["loss_regulariser"], expected, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(grad - base_grad, expected_grad, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(entropy_grad, expected_entropy_grad, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_its_expected_gradient_is_that_of_the_kl_divergence():
  """Over a categorical policy: the mean over samples of grad (logp - ref)^2 / 2 is grad KL."""
  with jax.enable_x64(True):
    logits, ref = jnp.array([0.3, -1.0, 0.8, 0.1]), jax.nn.log_softmax(jnp.array([1.0, 0, 0, -1.0]))

    def kl(logits):
      logp = jax.nn.log_softmax(logits)
      return (jnp.exp(logp) * (logp - ref)).sum()

    def penalty(logits, token):
      logp = jax.nn.log_softmax(logits)[token]
      one = jnp.ones((1, 1))
      config = ipa.IPAConfig(kl_weight=1.0)
      return ipa.regulariser(logp * one, ref[token] * one, None, one, config)

    probs = jax.nn.softmax(logits)
    expected = sum(probs[token] * jax.grad(penalty)(logits, token) for token in range(4))
    np.testing.assert_allclose(expected, jax.grad(kl)(logits), rtol=1e-10)


def test_what_a_weight_needs_is_asked_for():
  logp, batch, entropy = draw(0)
  without = dataclasses.replace(batch, ref_logp=None)
  with pytest.raises(ValueError, match=r"kl_weight > 0 needs ChunkBatch\.ref_logp"):
    ipa.ipa_loss(logp, without, ipa.IPAConfig(kl_weight=0.1), None, entropy)
  with pytest.raises(ValueError, match="entropy_weight > 0 needs entropy_BxT"):
    ipa.ipa_loss(logp, batch, ipa.IPAConfig(entropy_weight=0.1))
