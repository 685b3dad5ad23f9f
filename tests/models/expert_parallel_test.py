"""Experts on a mesh: the sums, statistics and gradients of one device, whatever the router does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import expert_parallel, sharding
from tests.models import meshes

B, T, D, F, E, K = 8, 8, 16, 12, 8, 3
CASES = [
  ("padded", {"fsdp": 1, "expert": 8}),
  ("ragged", {"data": 2, "fsdp": 1, "expert": 4}),
  ("dense", {"fsdp": 2, "expert": 2, "tensor": 2}),
  ("padded", {"fsdp": 2, "expert": 2, "tensor": 2}),
  ("ragged", {"fsdp": 1, "context": 2, "expert": 2, "tensor": 2}),
  ("padded", {"fsdp": 4, "tensor": 2}),
]


def layer_inputs(seed=0):
  rng = np.random.default_rng(seed)

  def draw(*shape):
    return rng.normal(size=shape).astype(np.float32) * shape[-2] ** -0.5

  real = np.arange(T)[None] < rng.integers(1, T + 1, (B, 1))
  return draw(B, T, D) * 3, draw(D, E) * 3, draw(E, D, 2 * F), draw(E, F, D), real


def run(impl, *args, normalise=True):
  """A loss with its parts (outputs, statistics), and its gradients."""

  def loss(x, router, gate_up, down, real, choices):
    y, stats = expert_parallel.sparse_layer(
      impl, K, normalise, x, router, gate_up, down, real, choices
    )
    wave = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    aux = stats["prob"] @ jnp.cos(jnp.arange(E, dtype=jnp.float32)) + stats["z"]
    return jnp.sum(y * wave) + 0.1 * aux, (y, stats)

  return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*args)


jitted = jax.jit(run, static_argnums=0, static_argnames="normalise")


def assert_equal(got, want):
  """Choices and loads are equal, all else to 1e-5 of its largest number."""
  (_, (_, stats)), _ = got
  (_, (_, want_stats)), _ = want
  np.testing.assert_array_equal(stats["choices"], want_stats["choices"])
  np.testing.assert_array_equal(stats["load"], want_stats["load"])
  close = functools.partial(np.testing.assert_allclose, rtol=0)
  jax.tree.map(lambda a, b: close(a, b, atol=1e-5 * np.abs(b).max()), got, want)


@pytest.mark.devices8
@pytest.mark.slow
@pytest.mark.parametrize(("impl", "sizes"), CASES, ids=str)
def test_a_mesh_computes_what_one_device_computes(impl, sizes):
  args = (*layer_inputs(), None)
  want = jitted("dense", *args)
  with jax.set_mesh(sharding.make_mesh(**sizes)):
    got = jitted(impl, *args)
  assert_equal(got, want)


@pytest.mark.devices8
@pytest.mark.slow
@pytest.mark.parametrize("impl", ["padded", "ragged"])
def test_no_token_is_dropped_when_all_want_the_same_experts(impl):
  x, router, gate_up, down, real = layer_inputs(1)
  choices = np.broadcast_to(np.array([5, 4, 7], np.int32), (B, T, K))  # none on the first device
  want = jitted("dense", x, router, gate_up, down, real, choices)
  with jax.set_mesh(sharding.make_mesh(fsdp=2, expert=4)):
    got = jitted(impl, x, router, gate_up, down, real, choices)
  assert_equal(got, want)
  (_, (y, stats)), _ = got
  np.testing.assert_array_equal(stats["load"], np.sum(real) * np.isin(np.arange(E), [4, 5, 7]))
  assert np.all(np.abs(np.asarray(y)).max(axis=-1) > 0)


@pytest.mark.devices8
@pytest.mark.slow
def test_many_copies_pass_one_devices_tokens_at_a_time(monkeypatch):
  args = (*layer_inputs(2), None)
  want = jitted("dense", *args)
  monkeypatch.setattr(expert_parallel, "MAX_COPIES", 1)
  some_at_a_time = jax.jit(lambda *args: run("ragged", *args))
  with jax.set_mesh(sharding.make_mesh(data=2, fsdp=1, expert=4)):
    text = some_at_a_time.lower(*args).as_text()
    got = some_at_a_time(*args)
  assert "stablehlo.while" in text
  assert_equal(got, want)


@pytest.mark.devices8
@pytest.mark.slow
def test_what_a_grouped_matmul_leaves_beyond_its_groups_is_not_read(monkeypatch):
  """On accelerators rows beyond the groups are not written: here they are NaN, in both passes."""
  clean = jax.lax.ragged_dot

  def poison(y, sizes):
    inside = jnp.arange(len(y))[:, None] < jnp.sum(sizes)
    return jnp.where(inside, y, jnp.nan)

  @jax.custom_vjp
  def dirty(x, w, sizes):
    return poison(clean(x, w, sizes), sizes)

  def forward(x, w, sizes):
    return dirty(x, w, sizes), (x, w, sizes)

  def backward(kept, grad):
    x, w, sizes = kept
    inside = jnp.arange(len(x))[:, None] < jnp.sum(sizes)
    _, pull = jax.vjp(lambda x, w: clean(x, w, sizes), x, w)
    dx, dw = pull(jnp.where(inside, grad, 0))
    return poison(dx, sizes), dw, None

  dirty.defvjp(forward, backward)
  ragged = functools.partial(expert_parallel.EXPERTS["ragged"], grouped_matmul=dirty)
  monkeypatch.setitem(expert_parallel.EXPERTS, "dirty", ragged)
  args = (*layer_inputs(3), None)
  want = jitted("dense", *args)
  with jax.set_mesh(sharding.make_mesh(fsdp=2, expert=4)):
    got = jitted("dirty", *args)
  assert_equal(got, want)


@pytest.mark.devices8
@pytest.mark.slow
def test_no_device_sees_all_tokens():
  """Gathered are tokens of `expert` alone: 2 devices of 4, so 4 of 8 rows on each."""
  args = (*layer_inputs(), None)
  with jax.set_mesh(meshes.mesh_of(4, fsdp=2, expert=2)):
    text = jitted.lower("ragged", *args).compile().as_text()
  assert f"f32[2,{2 * T},{D}]" in text  # all_gather over expert, of 2 rows each
  for shape in (f"f32[{B},{T},{D}]", f"f32[{B * T},{D}]", f"f32[4,{2 * T},{D}]"):
    made = [line for line in text.splitlines() if f"= {shape}" in line and "parameter(" not in line]
    assert not made, made
