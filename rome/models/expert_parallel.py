"""A sparse layer on a mesh: each device routes its own tokens and runs its own experts.

Tokens meet experts by a gather: the tokens of all devices along `expert` come to each of them,
which runs the experts it holds on the copies meant for them, and sums are scattered back to where
the tokens live. Nothing is dropped whatever the router does. `tensor` splits the inner width of
each expert; `fsdp` splits weights at rest, which are gathered here.

All of it runs in one `jax.shard_map`, also on meshes whose `expert` axis is 1: left to the
compiler, choosing experts (`top_k`) and sorting by them gather every token on every device.

Left out: exchanging only the copies that an expert wants (`jax.lax.ragged_all_to_all`, which CPUs
do not run); with K chosen experts, the gather brings up to shards / K times as many.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from rome.models import router, sharding
from rome.models.experts import EXPERTS

# Token copies in one call of the experts, unless one device's own are more: beyond it the gathered
# tokens pass one device's at a time. Choice: at a width of 2048 in bfloat16 these take 1 GiB, and
# every expert gets enough of them to be worth reading.
MAX_COPIES = 2**18


def sparse_layer(
  impl: str,
  num_chosen: int,
  normalise: bool,
  x_BxTxD: chex.Array,
  router_DxE: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
  real_BxT: chex.Array,
  choices_BxTxK: chex.Array | None = None,
  split_length: bool = True,
) -> tuple[chex.Array, router.Stats]:
  """Router and experts, on the mesh in use or without one.

  Args:
    impl: static, a key of `experts.EXPERTS`.
    num_chosen: static int K, experts a token.
    normalise: static, whether the chosen weights are scaled to sum to 1.
    x_BxTxD: [B, T, D].
    router_DxE: [D, E].
    gate_up_ExDx2F: [E, D, 2F], the gate first.
    down_ExFxD: [E, F, D].
    real_BxT: bool, False for padding.
    choices_BxTxK: int32 experts to visit instead of the router's choice, or None.
    split_length: static, whether rows are split over `context`.
  Returns:
    [B, T, D], and the router's statistics over all tokens (`router.router_stats`) with `choices`
    [B, T, K].
  """
  e, d, f2 = gate_up_ExDx2F.shape
  # With the halves apart, a slice of the inner width has its gate and its up together.
  gate_up = gate_up_ExDx2F.reshape(e, d, 2, f2 // 2)
  rows = ("batch", "length" if split_length else None)
  layer = functools.partial(_layer, impl, num_chosen, normalise, sharding.mesh_axes(*rows))
  args = (x_BxTxD, router_DxE, gate_up, down_ExFxD, real_BxT, choices_BxTxK)
  if not sharding.mesh_axes(*sharding.RULES):
    return layer(*args)
  tokens = sharding.spec(*rows, None)
  return jax.shard_map(
    layer,
    in_specs=(
      tokens,
      sharding.spec("hidden", None),
      sharding.spec("experts", "hidden", None, "mlp"),
      sharding.spec("experts", "mlp", "hidden"),
      sharding.spec(*rows),
      tokens,
    ),
    out_specs=(
      sharding.spec(*rows, "mlp"),
      dict.fromkeys(("load", "prob", "z"), sharding.spec()) | {"choices": tokens},
    ),
    # Implementations of the experts do not annotate what varies over the mesh; without the check
    # each cotangent of an argument is summed over the axes that do not split it, as it must be.
    check_vma=False,
  )(*args)


def _layer(
  impl: str,
  num_chosen: int,
  normalise: bool,
  token_axes: tuple[str, ...],
  x_BxTxD: chex.Array,
  router_DxE: chex.Array,
  gate_up_ExDx2xF: chex.Array,
  down_ExFxD: chex.Array,
  real_BxT: chex.Array,
  choices_BxTxK: chex.Array | None,
) -> tuple[chex.Array, router.Stats]:
  """One device's share: its tokens, its experts, its part of their inner width."""
  b, t, d = x_BxTxD.shape
  x = x_BxTxD.reshape(b * t, d)
  router_w = _gather(router_DxE, "hidden", 0).astype(jnp.float32)
  gate_up = _gather(gate_up_ExDx2xF, "hidden", 1).reshape(len(down_ExFxD), d, -1)
  down = _gather(down_ExFxD, "hidden", 2)
  logits = x.astype(jnp.float32) @ router_w
  choices = None if choices_BxTxK is None else choices_BxTxK.reshape(b * t, -1)
  weights, chosen = router.route(logits, num_chosen, normalise, choices)
  stats = router.router_stats(logits, chosen, real_BxT.reshape(b * t))
  for name in ("load", "prob", "z"):
    stats[name] = jax.lax.psum(stats[name], token_axes)
  stats["choices"] = chosen.reshape(b, t, -1)
  if sharding.mesh_axes("experts"):
    y = _run_everybodys(impl, x, weights, chosen, gate_up, down)
  else:
    y = EXPERTS[impl](x, weights, chosen, gate_up, down)
  if sharding.mesh_axes("mlp"):
    y = jax.lax.psum_scatter(y, "tensor", scatter_dimension=1, tiled=True)
  return y.reshape(b, t, -1), stats


def _gather(x: chex.Array, logical: str, axis: int) -> chex.Array:
  """`x` whole along `axis`, of which every device has a piece."""
  for name in sharding.mesh_axes(logical):
    x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
  return x


def _run_everybodys(
  impl: str,
  x_NxD: chex.Array,
  weights_NxK: chex.Array,
  chosen_NxK: chex.Array,
  gate_up_ExDx2F: chex.Array,
  down_ExFxD: chex.Array,
) -> chex.Array:
  """This device's experts on the tokens of all devices along `expert`: [N, D], its tokens' sums."""
  count = len(down_ExFxD)

  def own_experts(tokens: tuple) -> chex.Array:
    x, weights, chosen = tokens
    local = chosen - jax.lax.axis_index("expert") * count
    local = jnp.where((local >= 0) & (local < count), local, count)  # id E is nowhere
    return EXPERTS[impl](x, weights, local, gate_up_ExDx2F, down_ExFxD)

  gathered = jax.lax.all_gather((x_NxD, weights_NxK, chosen_NxK), "expert")
  if gathered[2].size <= MAX_COPIES:
    y = own_experts(jax.tree.map(lambda z: z.reshape(-1, z.shape[-1]), gathered))
  else:  # One device's tokens at a time, computed again in the backward pass.
    y = jax.lax.map(jax.checkpoint(own_experts), gathered)
  return jax.lax.psum_scatter(y.reshape(-1, y.shape[-1]), "expert", tiled=True)
