"""The loss over 8 devices: shards with global totals add up to one device's number and gradient."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rome import ipa
from tests.ipa import oracle

pytestmark = pytest.mark.devices8

CONFIGS = [
  ipa.IPAConfig(normaliser=name, mask_upper=1.1, lambda_il=0.7) for name in ipa.NORMALISERS
]
FULL = 1318  # Three chunks a row at least, trajectories that cross rows, 1e30 outside chunks.


@pytest.fixture
def mesh():
  return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def loss_and_grad(logp, batch, config, totals=None):
  (loss, _), grad = jax.value_and_grad(ipa.ipa_loss, has_aux=True)(logp, batch, config, totals)
  return loss, grad


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.normaliser)
@pytest.mark.parametrize("manual", [False, True], ids=["jit", "shard_map"])
def test_eight_shards_are_one_batch(mesh, config, manual):
  """jit: the compiler splits the rows. shard_map: each device sees its own, totals are psums."""
  logp, batch = oracle.random_batch(FULL, 16, 32, 6, np.float32)
  expected, expected_grad = jax.jit(loss_and_grad, static_argnums=2)(logp, batch, config)
  rows = NamedSharding(mesh, P("data"))
  logp_8, batch_8 = jax.device_put((logp, batch), rows)
  assert len(logp_8.addressable_shards) == 8 and logp_8.addressable_shards[0].data.shape[0] == 2

  def slice_of(logp, batch):
    totals = jax.lax.psum(ipa.loss_totals(batch, num_trajectories=96), "data")
    loss, grad = loss_and_grad(logp, batch, config, totals)
    return jax.lax.psum(loss, "data"), grad

  if manual:
    split = jax.shard_map(slice_of, mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data")))
    loss, grad = jax.jit(split)(logp_8, batch_8)
  else:
    loss, grad = jax.jit(loss_and_grad, static_argnums=2)(logp_8, batch_8, config)
  assert np.abs(expected_grad).max() > 0
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(grad, expected_grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", [ipa.topr, ipa.gspo])
def test_a_ratio_a_trajectory_runs_over_its_shards(mesh, estimator):
  """Rows of one trajectory in one call, on whichever devices."""
  logp, batch = oracle.random_batch(FULL, 16, 32, 6, np.float32)
  rows_of = {n: set(np.nonzero(batch.trajectory_ids == n)[0] // 2) for n in range(3)}
  assert any(len(shards) > 1 for shards in rows_of.values())
  config = ipa.IPAConfig(lambda_il=0.7)

  def loss_and_grad(logp, batch):
    return jax.value_and_grad(lambda logp: estimator(logp, batch, config)[0])(logp)

  expected, expected_grad = jax.jit(loss_and_grad)(logp, batch)
  split = jax.device_put((logp, batch), NamedSharding(mesh, P("data")))
  loss, grad = jax.jit(loss_and_grad)(*split)
  assert np.isfinite(expected) and np.abs(expected_grad).max() > 0
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-9)
