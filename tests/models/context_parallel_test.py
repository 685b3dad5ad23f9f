"""Rows split over devices: the attention and gradients of whole rows, with equal work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rome.models import context_parallel, sharding
from rome.models.attention import packed_attention
from tests.models import meshes

H = 8


def oracle(q, k, v, segment_ids):
  """float64, one query at a time."""
  b, t, n, h = q.shape
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for i in range(b):
    for j in range(t):
      seen = np.flatnonzero(segment_ids[i, : j + 1] == segment_ids[i, j])
      for head in range(n):
        g = head * k.shape[2] // n
        s = k[i, seen, g] @ q[i, j, head] / np.sqrt(h)
        p = np.exp(s - s.max())
        out[i, j, head] = p / p.sum() @ v[i, seen, g]
  return out


def draw(rows, length, heads=4, groups=2, seed=0):
  rng = np.random.default_rng(seed)
  q, k, v = (
    rng.normal(size=(rows, length, n, H)).astype(np.float32) for n in (heads, groups, groups)
  )
  _, segment_ids, _ = meshes.batch(rows, length, seed)
  return 2 * q, k, v, segment_ids


def loss(attend, q, k, v, segment_ids):
  y = attend(q, k, v, segment_ids)
  wave = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  return jnp.sum(y * wave), y


def of(attend):
  return jax.jit(jax.value_and_grad(functools.partial(loss, attend), (0, 1, 2), has_aux=True))


ring = of(functools.partial(context_parallel.attention, impl="auto"))
whole = of(functools.partial(packed_attention, impl="xla"))

MESHES = [
  (2, {"context": 2, "fsdp": 1}),
  (3, {"context": 3, "fsdp": 1}),
  (4, {"context": 4, "fsdp": 1}),
  (8, {"context": 8, "fsdp": 1}),
  (8, {"context": 2, "fsdp": 2, "tensor": 2}),
  (8, {"context": 4, "expert": 2, "fsdp": 1}),
]


@pytest.mark.devices8
@pytest.mark.slow
@pytest.mark.parametrize(("count", "sizes"), MESHES, ids=str)
def test_the_ring_says_what_whole_rows_say(count, sizes):
  args = draw(4, 48)
  with jax.set_mesh(meshes.mesh_of(count, **sizes)):
    (_, y), grads = ring(*args)
  np.testing.assert_allclose(y, oracle(*args), atol=1e-5)
  meshes.assert_same_gradients(grads, whole(*args)[1])


@pytest.mark.devices8
@pytest.mark.slow
def test_blocks_of_queries_change_nothing(monkeypatch):
  args = draw(2, 48, heads=6, groups=2)
  monkeypatch.setattr(context_parallel, "_BLOCK", 5)  # pieces of 12 fall into blocks of 4
  attend = functools.partial(context_parallel.attention, impl="auto")
  with jax.set_mesh(meshes.mesh_of(2, context=2, fsdp=1)):
    (_, y), grads = of(lambda *xs: attend(*xs))(*args)
  np.testing.assert_allclose(y, oracle(*args), atol=1e-5)
  meshes.assert_same_gradients(grads, whole(*args)[1])


@pytest.mark.devices8
@pytest.mark.slow
def test_bfloat16_rounds_as_whole_rows_do():
  args = draw(2, 48)
  low = [jnp.asarray(x, jnp.bfloat16) for x in args[:3]]
  with jax.set_mesh(meshes.mesh_of(4, context=4, fsdp=1)):
    (_, y), grads = ring(*low, args[3])
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(y.astype(jnp.float32), oracle(*low, args[3]), atol=0.03)
  for got, want in zip(grads, whole(*args)[1], strict=True):
    assert np.linalg.norm(got.astype(jnp.float32) - want) <= 0.02 * np.linalg.norm(want)


def pieces_of(count):
  """Which of 2 * count pieces each device has after the swap."""
  held = [[] for _ in range(count)]
  for kind, route in enumerate(context_parallel.routes(count)):
    assert sorted(to for _, to in route) == list(range(count))  # a permutation
    for start, to in route:
      held[to].append(2 * start + kind)
  return held


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_every_device_gets_a_piece_and_its_mirror_image(count):
  want = [[i, 2 * count - 1 - i] for i in range(count)]
  assert [sorted(pieces) for pieces in pieces_of(count)] == want


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_device_has_equal_work_in_every_round(count):
  """Pairs of pieces that are not left out: two of four, and one more with itself."""
  places = [[4 * piece + np.arange(4)[None] for piece in pieces] for pieces in pieces_of(count)]

  def work(mine, theirs):
    return sum(bool(context_parallel.may_see((None, q), (None, k))) for q in mine for k in theirs)

  for shift in range(count):
    rounds = {work(places[i], places[(i - shift) % count]) for i in range(count)}
    assert rounds == ({3} if shift == 0 else {2})


@pytest.mark.devices8
@pytest.mark.slow
def test_no_device_holds_scores_or_keys_of_a_whole_row():
  t = 512
  shapes = [jax.ShapeDtypeStruct((1, t, n, H), jnp.float32) for n in (4, 2, 2)]
  ids = jax.ShapeDtypeStruct((1, t), jnp.int32)
  with jax.set_mesh(sharding.make_mesh(context=8, fsdp=1)):
    held = ring.lower(*shapes, ids).compile().memory_analysis().temp_size_in_bytes
  scores = 4 * (t // 8) * (t // 8) * 4  # of one device's own places, 4 heads, 4 bytes
  assert held < 12 * scores < 4 * t * t * 4 // 4


def _memory_of_layers(length):
  """Bytes of temporaries of a gradient through three layers in a scan."""

  def layer(x, segment_ids):
    q = x.reshape(*x.shape[:2], 4, H)
    kv = q[:, :, :2]
    return x + context_parallel.attention(q, kv, kv, segment_ids, "auto").reshape(x.shape)

  def total(x, segment_ids):
    run = jax.checkpoint(lambda x, _: (layer(x, segment_ids), None))
    return jnp.sum(jax.lax.scan(run, x, None, length=3)[0] ** 2)

  shapes = (
    jax.ShapeDtypeStruct((2, length, 4 * H), jnp.float32),
    jax.ShapeDtypeStruct((2, length), jnp.int32),
  )
  return jax.jit(jax.grad(total)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.devices8
@pytest.mark.slow
def test_a_scan_over_layers_keeps_no_masks():
  """Memory grows with the length of a row, not with its square."""
  with jax.set_mesh(sharding.make_mesh(context=8, fsdp=1)):
    short, long = _memory_of_layers(8192), _memory_of_layers(16384)
  assert long < 2.2 * short


@pytest.mark.devices8
def test_an_implementation_for_whole_rows_is_refused_where_rows_are_split():
  args = draw(1, 16)
  with jax.set_mesh(meshes.mesh_of(2, context=2, fsdp=1)):
    with pytest.raises(ValueError, match="compute.attention=blockwise needs whole rows"):
      context_parallel.attention(*args, impl="blockwise")
