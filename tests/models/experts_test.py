"""The block-padded experts against the dense ones, and both against loops in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import experts as impls
from rome.models import router

N, D, F, E = 23, 5, 3, 4  # odd on purpose: no size divides a block
PADDED = jax.jit(impls.experts_padded)


def weights_of_experts(seed=0):
  gate_up, down = np.random.default_rng(seed).normal(size=(2, E, D, 2 * F)).astype(np.float32)
  return jnp.asarray(gate_up), jnp.asarray(down.reshape(E, 2 * F, D)[:, :F])


def routing(kind, n=N, k=2):
  """[n, k] expert ids, distinct in each row, unevenly spread in a stated way."""
  rng = np.random.default_rng(1)
  if kind == "one":
    return np.tile(np.arange(k, dtype=np.int32) + 1, (n, 1))
  odds = {"even": [1, 1, 1, 1], "skewed": [40, 8, 2, 1], "two": [1, 1, 0, 0]}[kind]
  odds = np.array(odds) / sum(odds)
  chosen = [rng.choice(E, k, replace=False, p=odds) for _ in range(n)]
  return np.array(chosen, np.int32)


def loops(x, weights, experts, gate_up, down):
  """The definition: y_n = sum_k w_nk down_e(silu(gate_e x_n) * up_e x_n), in float64."""
  x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
  y = np.zeros_like(x)
  for n in range(len(x)):
    for weight, e in zip(weights[n], experts[n], strict=True):
      gate, up = np.split(x[n] @ gate_up[e], 2)
      y[n] += weight * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
  return y


def draw(kind, n=N, k=2, seed=2):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(n, D)), jnp.float32)
  weights = jnp.asarray(rng.random((n, k)), jnp.float32)
  return x, weights, jnp.asarray(routing(kind, n, k))


# The last three overflow their slots: by one block, by several, by several of one expert alone.
CASES = [("even", N, 2), ("two", N, 2), ("one", N, 2), ("even", 1, 2), ("skewed", N, 4)]
CASES += [("skewed", N, 2), ("skewed", 900, 2), ("one", 600, 1)]


def overflow(experts):
  """Blocks that the slots leave over."""
  slots = impls._num_slots(experts.size, E)
  return int(np.sum(-(-np.maximum(np.bincount(experts.ravel()) - slots, 0) // impls._BLOCK)))


def test_the_cases_overflow_as_they_say():
  blocks = [overflow(routing("even" if k == 4 else kind, n, k)) for kind, n, k in CASES]
  assert blocks[0] == 0 and blocks[-3] == 1 and blocks[-2] > 2 and blocks[-1] > 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "n", "k"), CASES)
def test_every_implementation_is_the_definition(kind, n, k):
  kind = "even" if k == 4 else kind
  x, weights, experts = draw(kind, n, k)
  tensors = weights_of_experts()
  want = loops(x, weights, np.asarray(experts), *tensors)
  for name, impl in impls.EXPERTS.items():
    if name == "megablox":  # runs on TPUs only; megablox_test.py interprets it
      continue
    got = jax.jit(impl)(x, weights, experts, *tensors)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["padded", "ragged"])
@pytest.mark.parametrize(("kind", "n", "k"), [("skewed", 900, 2), ("one", 600, 1), ("two", N, 2)])
def test_gradients_agree(kind, n, k, impl):
  x, weights, experts = draw(kind, n, k)
  direction = jnp.asarray(np.random.default_rng(3).normal(size=(n, D)), jnp.float32)

  def gradients(impl):
    def loss(x, weights, gate_up, down):
      return (impl(x, weights, experts, gate_up, down) * direction).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(x, weights, *weights_of_experts())

  dense, got = gradients(impls.experts_dense), gradients(impls.EXPERTS[impl])
  for name, a, b in zip(("x", "weights", "gate_up", "down"), got, dense, strict=True):
    assert np.abs(b).max() > 0.1, name
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_copy_sent_nowhere_adds_nothing():
  """Expert id E, which expert parallelism gives to copies of another shard."""
  x, weights, experts = draw("skewed", 400)
  gone = jnp.asarray(np.random.default_rng(5).random(experts.shape) < 0.5)

  def output_and_gradients(weights, experts):
    def loss(x, weights, *tensors):
      y = impls.experts_padded(x, weights, experts, *tensors)
      return (y * jnp.cos(jnp.arange(D, dtype=jnp.float32))[None]).sum(), y

    return jax.grad(loss, argnums=(0, 2, 3), has_aux=True)(x, weights, *weights_of_experts())

  run = jax.jit(output_and_gradients)
  here, zeroed = run(weights, jnp.where(gone, E, experts)), run(weights * ~gone, experts)
  for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(zeroed), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_an_expert_that_nobody_chose_gets_no_gradient():
  x, weights, experts = draw("two")

  def loss(gate_up, down):
    return impls.experts_padded(x, weights, experts, gate_up, down).sum()

  for gradient in jax.grad(loss, argnums=(0, 1))(*weights_of_experts()):
    assert np.abs(gradient[:2]).min() > 0 and not gradient[2:].any()


@pytest.mark.slow
def test_no_token_reaches_another():
  """Row n of the output depends on row n of the input alone, wherever sorting puts it."""
  x, weights, experts = draw("skewed")

  @jax.jit
  def run(x):
    return impls.experts_padded(x, weights, experts, *weights_of_experts())

  touched = np.asarray(run(x) != run(x.at[7].add(1.0))).any(axis=1)
  assert touched.tolist() == [n == 7 for n in range(N)]


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.slow
def test_route_against_numpy(normalise):
  logits = np.random.default_rng(4).normal(size=(N, E)).astype(np.float32)
  weights, experts = router.route(jnp.asarray(logits), 2, normalise)
  probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  want = np.argsort(-probs, axis=1)[:, :2]
  np.testing.assert_array_equal(experts, want)
  chosen = np.take_along_axis(probs, want, axis=1)
  chosen = chosen / chosen.sum(axis=1, keepdims=True) if normalise else chosen
  np.testing.assert_allclose(weights, chosen, rtol=1e-5)
