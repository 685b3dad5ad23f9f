"""The sampled distribution against a small reference, and its gradient where it has holes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.models import Sampling, distribution, token_logps

jitted = jax.jit(distribution, static_argnums=1)


def reference(logits, temperature, top_k, top_p):
  """One row at a time, float64, by sorting: probabilities of the sampled distribution."""
  logits = np.asarray(logits, np.float64) / temperature
  order = np.argsort(-logits, kind="stable")
  probs = np.exp(logits - logits.max())
  keep = np.ones(len(logits), bool)
  if top_k:
    keep = logits >= logits[order[min(top_k, len(logits)) - 1]]
  probs = np.where(keep, probs, 0)
  probs /= probs.sum()
  if top_p < 1:
    mass = 0.0
    for i in order:
      keep[i] &= mass < top_p
      mass += probs[i]
  probs = np.where(keep, probs, 0)
  return probs / probs.sum()


SETTINGS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 3, 1.0), (1.0, 1, 1.0), (1.0, 99, 1.0)]
SETTINGS += [(1.0, 0, 0.9), (0.5, 0, 0.3), (1.0, 0, 1e-6), (1.3, 5, 0.8)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
@pytest.mark.slow
def test_against_the_reference(temperature, top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(3, 4, 11)).astype(np.float32) * 2
  logp = distribution(jnp.asarray(logits), Sampling(temperature, top_k, top_p))
  want = np.apply_along_axis(reference, -1, logits, temperature, top_k, top_p)
  np.testing.assert_allclose(np.exp(logp), want, atol=1e-6)
  assert np.isneginf(np.asarray(logp)[want == 0]).all()


def test_values_by_hand():
  logits = jnp.log(jnp.array([[0.5, 0.25, 0.125, 0.125]]))

  def kept(**kwargs):
    return np.exp(distribution(logits, Sampling(**kwargs)))[0].tolist()

  assert kept(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0])
  # Ties at the boundary stay, so three are asked for and four come.
  assert kept(top_k=3) == pytest.approx([0.5, 0.25, 0.125, 0.125])
  assert kept(top_p=0.4) == pytest.approx([1, 0, 0, 0])
  assert kept(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])
  assert kept(temperature=0.5) == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 0.05, 0.5, 0.95]))
@pytest.mark.slow
def test_the_most_probable_token_always_stays(seed, top_p):
  """Rounding must not empty the nucleus: the threshold is compared in the units it was made in."""
  logits = np.random.default_rng(seed).normal(size=(64, 264)).astype(np.float32)
  logp = np.asarray(jitted(jnp.asarray(logits), Sampling(top_p=top_p)))
  assert np.isfinite(logp[np.arange(64), logits.argmax(axis=1)]).all()
  np.testing.assert_allclose(np.exp(logp).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_token_logps_shifts_by_one():
  logits = np.random.default_rng(1).normal(size=(2, 5, 7)).astype(np.float32)
  tokens = np.random.default_rng(2).integers(0, 7, (2, 5))
  logp, entropy = token_logps(jnp.asarray(logits), jnp.asarray(tokens), Sampling(temperature=0.8))
  probs = np.apply_along_axis(reference, -1, logits, 0.8, 0, 1.0)
  assert not logp[:, 0].any() and not entropy[:, 0].any()
  for b in range(2):
    for t in range(1, 5):
      assert logp[b, t] == pytest.approx(np.log(probs[b, t - 1, tokens[b, t]]), rel=1e-5)
      want = -(probs[b, t - 1] * np.log(probs[b, t - 1])).sum()
      assert entropy[b, t] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_excluded_tokens_do_not_poison_entropy_or_gradient():
  logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 9)), jnp.float32)
  sampling = Sampling(top_k=3, top_p=0.9)
  best = jnp.argmax(logits[:, :-1], axis=-1)
  tokens = jnp.concatenate([jnp.zeros((2, 1), best.dtype), best], axis=1)

  def loss(logits):
    logp, entropy = token_logps(logits, tokens, sampling)
    return logp.sum() + entropy.sum(), (logp, entropy)

  gradient, (logp, entropy) = jax.jit(jax.grad(loss, has_aux=True))(logits)
  assert np.isfinite(logp).all() and np.isfinite(entropy).all() and np.isfinite(gradient).all()
  # d log p_a / d logit_v = [a = v] - p_v and d H / d logit_v = -p_v (log p_v + H): excluded tokens
  # have no part in it, kept ones have.
  logp_v = np.asarray(distribution(logits, sampling))[:, :-1]
  probs, onehot = np.exp(logp_v), np.eye(9)[np.asarray(best)]
  surprise = np.where(probs > 0, logp_v, 0) + entropy[:, 1:, None]
  np.testing.assert_allclose(gradient[:, :-1], onehot - probs - probs * surprise, atol=1e-6)
  assert (entropy[:, 1:] <= np.log(3) + 1e-6).all()


@pytest.mark.slow
def test_an_excluded_token_is_minus_infinity_and_never_nan():
  logits = jnp.array([[[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
  logp, _ = token_logps(logits, jnp.array([[0, 2]]), Sampling(top_k=1))
  assert np.isneginf(logp[0, 1])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"temperature": 0.0}, "sampling.temperature must be a positive number, got 0.0"),
    ({"temperature": float("nan")}, "sampling.temperature must be a positive number, got nan"),
    ({"temperature": float("inf")}, "sampling.temperature must be a positive number, got inf"),
    ({"top_k": -1}, "sampling.top_k must be >= 0"),
    ({"top_p": 0.0}, r"sampling.top_p must be in \(0, 1\], got 0.0"),
    ({"top_p": 1.5}, r"sampling.top_p must be in \(0, 1\], got 1.5"),
  ],
)
def test_impossible_settings(change, message):
  with pytest.raises(ValueError, match=message):
    Sampling(**change)
