"""The router's losses against transformers and by hand; cut anywhere, they add up; they even."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import balance, router

E, K = 4, 2
# What `f(tuple(torch.from_numpy(LOGITS)), E, K, torch.from_numpy(MASK).reshape(2, 3))` says, with
# f = transformers.models.qwen3_moe.modeling_qwen3_moe.load_balancing_loss_func of transformers
# 5.23.0 on torch 2.13.0, and the gradient of the masked one at [layer 0, token 0].
LOGITS = np.random.default_rng(0).normal(size=(2, 6, E)).astype(np.float32)
MASK = np.array([1, 1, 1, 0, 1, 0])
THEIRS = 2.1940958499908447
THEIRS_MASKED = 2.082326889038086
THEIR_GRADIENT = [-0.0303, -0.0016, 0.0201, 0.0118]


@functools.partial(jax.jit, static_argnames="k")
def stats_of(logits_SxNxE, mask_N=None, k=K):
  """What `hidden_states` returns for layers with these router logits."""
  mask = jnp.ones(logits_SxNxE.shape[1], bool) if mask_N is None else jnp.asarray(mask_N, bool)

  def layer(logits):
    return router.router_stats(logits, router.route(logits, k, True)[1], mask)

  return jax.vmap(layer)(jnp.asarray(logits_SxNxE))


@functools.partial(jax.jit, static_argnames="k")
def loss_of(logits, mask=None, k=K):
  stats = stats_of(logits, mask, k)
  tokens = logits.shape[1] if mask is None else mask.sum()
  return balance.balance_loss(stats, stats["load"], len(logits) * tokens)


@pytest.mark.slow
def test_the_loss_of_transformers():
  assert float(loss_of(LOGITS)) == pytest.approx(THEIRS, rel=1e-6)
  value, gradient = jax.value_and_grad(loss_of)(jnp.asarray(LOGITS), MASK)
  assert float(value) == pytest.approx(THEIRS_MASKED, rel=1e-6)
  np.testing.assert_allclose(gradient[0, 0], THEIR_GRADIENT, atol=5e-5)
  assert not np.asarray(gradient)[:, MASK == 0].any()


def test_an_even_router_costs_k_and_one_expert_costs_e():
  """Probabilities all equal: whichever experts ties choose, E * sum_e f_e / E = sum_e f_e = K."""
  assert float(loss_of(np.zeros((3, 5, E), np.float32))) == K
  one = np.tile(np.array([200, 0, 0, 0], np.float32), (3, 5, 1))
  assert float(loss_of(one, k=1)) == E


@pytest.mark.slow
def test_uneven_layers_that_even_each_other_out_cost_nothing():
  """Layers are pooled, as in transformers: layer s sends everything to expert s."""
  logits = np.stack([np.tile(200 * np.eye(E, dtype=np.float32)[s], (5, 1)) for s in range(E)])
  assert float(loss_of(logits, k=1)) == 1
  assert float(balance.load_metrics(stats_of(logits, k=1)["load"])["expert_load_max"]) == E


@pytest.mark.slow
def test_the_z_loss_by_hand():
  """log sum exp of four zeros is log 4, of (log 2, log 2, 0, 0) log 6; the third is padding."""
  logits = np.log(np.array([[[1, 1, 1, 1], [2, 2, 1, 1], [9, 9, 9, 9]]], np.float32))
  stats = stats_of(logits, np.array([1, 1, 0]))
  want = (np.log(4) ** 2 + np.log(6) ** 2) / 2
  assert float(balance.z_loss(stats, 2)) == pytest.approx(want, rel=1e-6)
  gradient = jax.grad(lambda x: balance.z_loss(stats_of(x, np.array([1, 1, 0])), 2))(logits)
  # d/dx of (log sum exp)^2 / 2 is log sum exp * softmax.
  np.testing.assert_allclose(gradient[0, 1], np.log(6) * np.array([2, 2, 1, 1]) / 6, rtol=1e-5)
  assert not np.asarray(gradient)[0, 2].any()


@pytest.mark.slow
def test_parts_add_up():
  """Value and gradient, of parts with 3 and 1 real tokens; each part's own balance does not."""
  weights = balance.RouterLoss(balance=0.7, z=0.2)
  parts = [slice(0, 3), slice(3, 6)]
  load, rows = stats_of(LOGITS, MASK)["load"], 2 * MASK.sum()

  @jax.jit
  def cut(logits, totals):
    stats = [stats_of(logits[:, p], MASK[p]) for p in parts]
    return sum(balance.router_loss(s, totals, weights) for s in stats)

  @jax.jit
  def whole(logits):
    totals = balance.RouterTotals(rows)
    return balance.router_loss(stats_of(logits, MASK), totals, weights)

  want, want_gradient = jax.value_and_grad(whole)(LOGITS)
  got, gradient = jax.value_and_grad(cut)(LOGITS, balance.RouterTotals(rows, load))
  assert float(got) == pytest.approx(float(want), rel=1e-6)
  np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)
  assert abs(float(cut(LOGITS, balance.RouterTotals(rows))) - float(want)) > 0.1


def test_no_weight_no_loss():
  stats, totals = stats_of(LOGITS), balance.RouterTotals(12)
  assert float(balance.router_loss(stats, totals, balance.RouterLoss())) == 0
  assert float(balance.router_loss({}, totals, balance.RouterLoss(1.0, 1.0))) == 0
  assert balance.sums({}) == {} and balance.router_metrics({}) == {}
  for bad in ({"balance": -0.1}, {"z": float("nan")}, {"balance": float("inf")}):
    with pytest.raises(ValueError, match=f"weight {next(iter(bad))} must be at least 0"):
      balance.RouterLoss(**bad)


@pytest.mark.slow
def test_metrics_by_hand():
  load = np.array([[6, 2, 0, 0], [2, 2, 2, 2]], np.float32)
  found = {k: float(v) for k, v in balance.load_metrics(jnp.asarray(load)).items()}
  entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
  assert found == {
    "expert_load_max": pytest.approx(3.0),
    "expert_idle": pytest.approx(0.25),
    "expert_entropy": pytest.approx((entropy + 1) / 2),
  }
  nothing = balance.load_metrics(jnp.zeros((2, 4)))
  assert all(np.isfinite(float(v)) for v in nothing.values())


@pytest.mark.slow
def test_metrics_of_parts_are_those_of_the_whole():
  whole = balance.router_metrics(balance.sums(stats_of(LOGITS, MASK)))
  parts = [balance.sums(stats_of(LOGITS[:, p], MASK[p])) for p in (slice(0, 2), slice(2, 6))]
  added = balance.router_metrics(jax.tree.map(jnp.add, *parts))
  assert "choices" not in parts[0]
  assert float(whole["router_balance"]) == pytest.approx(THEIRS_MASKED, rel=1e-6)
  for name, value in whole.items():
    assert float(added[name]) == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.slow
def test_training_evens_a_skewed_router():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32).at[:, 0].set(1.0)
  start = jnp.asarray(rng.normal(size=(8, E)) * 0.1, jnp.float32).at[0, 0].add(2.0)

  def loss(weight):
    stats = stats_of((x @ weight)[None], k=1)
    return balance.balance_loss(stats, stats["load"], 64), balance.load_metrics(stats["load"])

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  weight, seen = start, []
  for _ in range(60):
    (value, metrics), gradient = step(weight)
    seen.append((float(value), float(metrics["expert_load_max"]), float(metrics["expert_idle"])))
    weight = weight - 1.0 * gradient
  assert seen[0][0] > 2 and seen[0][1] > 3.5 and seen[0][2] > 0
  assert seen[-1][0] < 1.1 and seen[-1][1] < 1.7 and seen[-1][2] == 0
