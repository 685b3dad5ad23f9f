"""LoRA (arXiv:2106.09685): low-rank adapters beside any projection, in the same parameter tree.

An adapted projection computes x @ W + (x @ A) @ B * alpha / rank. Its arrays lie beside the kernel:

  attn/q_proj/{kernel, lora_a [D, r], lora_b [r, N, H], lora_alpha []}     likewise o_proj, lm_head
  mlp/{down_proj [E, F, D], down_proj_lora_a [E, F, r], down_proj_lora_b [E, r, D], ..._alpha []}

with one more leading axis where layers are stacked. Alpha is a leaf of its own and the rank is a
shape, so a checkpoint cannot lose the scale. Choice: alpha is not folded into A, where Adam's step,
whose size ignores the gradient's, would train A more slowly the larger alpha is.

A tree with adapters trains its adapters alone: `freeze`, which the decoder calls, stops the
gradient of everything else, so that no gradient of a frozen kernel is computed; `split` keeps
gradients and optimiser moments of frozen arrays from existing at all. A tree without trains whole.

Projections add two thin products. Experts and the head use the effective kernel W + A @ B instead,
which keeps every implementation of theirs as it is, and costs once a layer, whatever the number of
tokens: one more array of the kernel's size, its product of 2 * r * size operations, and in the
backward pass a gradient of the kernel's size.

Left out: dropout, DoRA, ranks that differ between projections, several adapters at once, router and
embedding adapters.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
from flax import traverse_util

from rome.models.config import ModelConfig
from rome.models.layout import is_stacked, stages

PARTS = ("lora_a", "lora_b", "lora_alpha")


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a projection lies.

  Attributes:
    path: keys from a layer (from the root for the head) to the dict that holds the kernel.
    kernel: its key there.
    layers: "all", "dense" or "sparse": which layers have it; "none" for the head.
    inputs: how many axes of the kernel are contracted.
  """

  path: tuple[str, ...]
  kernel: str = "kernel"
  layers: str = "all"
  inputs: int = 1

  @property
  def prefix(self) -> str:
    """What stands in front of the names of `PARTS`."""
    return _prefix(self.kernel)

  @property
  def of_experts(self) -> bool:
    """Whether the kernel has a leading axis of experts."""
    return self.layers == "sparse"


TARGETS = {
  "q_proj": Target(("attn", "q_proj")),
  "k_proj": Target(("attn", "k_proj")),
  "v_proj": Target(("attn", "v_proj")),
  "o_proj": Target(("attn", "o_proj"), inputs=2),
  "gate_proj": Target(("mlp", "gate_proj"), layers="dense"),
  "up_proj": Target(("mlp", "up_proj"), layers="dense"),
  "down_proj": Target(("mlp", "down_proj"), layers="dense"),
  "experts.gate_up_proj": Target(("mlp",), kernel="gate_up_proj", layers="sparse"),
  "experts.down_proj": Target(("mlp",), kernel="down_proj", layers="sparse"),
  "lm_head": Target(("lm_head",), layers="none"),
}


def _prefix(kernel: str) -> str:
  return "" if kernel == "kernel" else f"{kernel}_"


# --- in the forward pass -------------------------------------------------------------------------


def project(x: chex.Array, node: Mapping, inputs: int = 1) -> chex.Array:
  """(x @ A) @ B * alpha / rank over the last `inputs` axes of `x`, in the type of `x`."""
  a, b, alpha = (node[part] for part in PARTS)
  low = jnp.tensordot(x, a.astype(x.dtype), axes=inputs)
  low = low * (alpha / a.shape[-1]).astype(x.dtype)
  return jnp.tensordot(low, b.astype(x.dtype), axes=1)


def effective(node: Mapping, kernel: str = "kernel") -> chex.Array:
  """`node[kernel]`, plus A @ B * alpha / rank where it has an adapter; of one layer, float32."""
  prefix = _prefix(kernel)
  if f"{prefix}lora_a" not in node:
    return node[kernel]
  a, b, alpha = (node[prefix + part] for part in PARTS)
  product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
  if prefix:  # experts
    product = jax.vmap(product)
  return node[kernel] + product(a * (alpha / a.shape[-1]), b)


def freeze(params: dict) -> dict:
  """`params` with the gradient of all but adapters stopped; as they are where there are none."""
  if not has_lora(params):
    return params
  return jax.tree.map(
    lambda trains, x: x if trains else jax.lax.stop_gradient(x), trainable_mask(params), params
  )


# --- the tree ------------------------------------------------------------------------------------


def add_lora(
  config: ModelConfig,
  params: dict,
  key: chex.PRNGKey,
  rank: int,
  alpha: float,
  targets: Sequence[str],
) -> dict:
  """The same parameters with fresh adapters, which change no output.

  A starts uniform in +-1/sqrt(inputs) and B at zero, as in PEFT. Stacked layers get the values that
  they would get one by one.

  Args:
    config: the model's sizes.
    params: as `init_params` gives, stacked or not, without adapters.
    key: typed PRNG key.
    rank: r >= 1.
    alpha: > 0; the adapters' product is scaled by alpha / rank.
    targets: names of `TARGETS`; each is adapted in every layer that has it.
  Raises:
    ValueError: the rank, alpha or a target cannot be, or there are adapters already.
  """
  if rank < 1:
    raise ValueError(f"lora rank must be at least 1, got {rank}")
  names = list(TARGETS)

  def fresh(name: str, layer: int, kernel: tuple[int, ...]) -> tuple[chex.Array, chex.Array]:
    shape_a, shape_b = shapes(TARGETS[name], kernel, rank)
    bound = math.prod(shape_a[TARGETS[name].of_experts : -1]) ** -0.5
    mine = jax.random.fold_in(jax.random.fold_in(key, layer + 1), names.index(name))
    return jax.random.uniform(mine, shape_a, minval=-bound, maxval=bound), jnp.zeros(shape_b)

  return attach(config, params, alpha, targets, fresh)


def attach(
  config: ModelConfig,
  params: dict,
  alpha: float,
  targets: Sequence[str],
  make: Callable[[str, int, tuple[int, ...]], tuple[chex.Array, chex.Array]],
) -> dict:
  """`params` with the adapters that `make(target, layer, shape of its kernel)` returns as (A, B).

  The layer of the head is -1. Raises as `add_lora` does.
  """
  _check(config, params, alpha, targets)
  out = jax.tree.map(lambda x: x, params)  # fresh dicts, the same arrays
  for name in TARGETS:
    if name not in targets:
      continue
    for target, node, layers, stacked in _places(config, out, name):
      kernel = node[target.kernel].shape[stacked:]
      pairs = [make(name, layer, kernel) for layer in layers]
      a, b = (jnp.stack(x) if stacked else x[0] for x in zip(*pairs, strict=True))
      scale = jnp.full(len(layers) if stacked else (), alpha, jnp.float32)
      node |= {target.prefix + k: v for k, v in zip(PARTS, (a, b, scale), strict=True)}
  return out


def _places(
  config: ModelConfig, params: dict, name: str
) -> Iterator[tuple[Target, dict, Sequence[int], bool]]:
  """Each dict that holds a kernel of target `name`: (target, dict, its layers, whether stacked)."""
  target = TARGETS[name]

  def find(node: dict) -> dict:
    return functools.reduce(lambda n, k: n[k], target.path, node)

  if target.layers == "none":
    yield target, find(params), (-1,), False
    return
  for stage in stages(config, is_stacked(params)):
    if target.layers == "all" or (target.layers == "sparse") == stage.sparse:
      layers = range(stage.first, stage.first + stage.count)
      yield target, find(params[stage.name]), layers, stage.stacked


def shapes(
  target: Target, kernel: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of A and B beside a kernel of one layer with this shape."""
  at = target.of_experts + target.inputs
  return (*kernel[:at], rank), (*kernel[: target.of_experts], rank, *kernel[at:])


def _check(config: ModelConfig, params: dict, alpha: float, targets: Sequence[str]) -> None:
  if not 0 < alpha < math.inf:
    raise ValueError(f"lora alpha must be a positive number, got {alpha}")
  if not targets:
    raise ValueError(f"lora targets name no projection; known: {', '.join(TARGETS)}")
  sparse = {config.is_sparse(i) for i in range(config.num_hidden_layers)}
  for name in targets:
    if name not in TARGETS:
      raise ValueError(f"lora target {name!r} is unknown; known: {', '.join(TARGETS)}")
    layers = TARGETS[name].layers
    if layers in ("dense", "sparse") and (layers == "sparse") not in sparse:
      raise ValueError(f"lora target {name!r}: the model has no {layers} layer")
    if layers == "none" and config.tie_word_embeddings:
      raise ValueError(f"lora target {name!r}: the model's head is its embedding (tied)")
  if has_lora(params):
    raise ValueError("the parameters have lora adapters already: merge_lora them, or start without")


def targets_of(config: ModelConfig, params: dict) -> list[str]:
  """Names of the adapted projections, in the order of `TARGETS`."""
  return [
    name
    for name, target in TARGETS.items()
    if (target.layers != "none" or "lm_head" in params)
    and any(f"{target.prefix}lora_a" in node for _, node, _, _ in _places(config, params, name))
  ]


def adapters_of(
  config: ModelConfig, params: dict, name: str
) -> Iterator[tuple[int, chex.Array, chex.Array, chex.Array]]:
  """(layer, A, B, alpha) of each layer's adapter of target `name`; the layer of the head is -1."""
  for target, node, layers, stacked in _places(config, params, name):
    for i, layer in enumerate(layers):
      a, b, alpha = (node[target.prefix + part] for part in PARTS)
      yield (layer, a[i], b[i], alpha[i]) if stacked else (layer, a, b, alpha)


def has_lora(params: dict) -> bool:
  """Whether there is an adapter in the tree."""
  return any(path[-1].endswith("lora_a") for path in traverse_util.flatten_dict(params))


def trainable_mask(params: dict) -> dict:
  """True where an array trains: A and B of adapters, or everything where there are none.

  For optax: `optax.masked(optimizer, mask)` gives frozen arrays no moments, but passes their
  gradients (zeros) on; where the tree is large, `split` it instead.
  """
  flat = traverse_util.flatten_dict(params)
  every = not has_lora(params)
  return traverse_util.unflatten_dict(
    {path: every or path[-1].endswith(("lora_a", "lora_b")) for path in flat}
  )


def split(params: dict) -> tuple[dict, dict]:
  """(what trains, what is frozen); ({...}, {}) where there are no adapters. `join` undoes it.

  Gradients with respect to the first alone, and optimiser states of it, cost nothing for the rest.
  """
  if not has_lora(params):
    return params, {}
  flat, mask = map(traverse_util.flatten_dict, (params, trainable_mask(params)))
  trains, frozen = ({k: v for k, v in flat.items() if mask[k] == side} for side in (True, False))
  return traverse_util.unflatten_dict(trains), traverse_util.unflatten_dict(frozen)


def join(trainable: dict, frozen: dict) -> dict:
  """The tree that `split` took apart."""
  if not frozen:
    return trainable
  flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(trainable)
  return traverse_util.unflatten_dict(flat)


def merge_lora(params: dict) -> dict:
  """Plain parameters that compute the same: every W is W + A @ B * alpha / rank.

  Raises:
    ValueError: there are no adapters.
  """
  if not has_lora(params):
    raise ValueError("the parameters have no lora adapters to merge")

  def merge(node: dict, stacked: bool) -> dict:
    out = {}
    for name, value in node.items():
      prefix = _prefix(name)
      if isinstance(value, dict):
        out[name] = merge(value, stacked)
      elif f"{prefix}lora_a" in node:
        one = functools.partial(effective, kernel=name)
        mine = {name: value} | {prefix + part: node[prefix + part] for part in PARTS}
        out[name] = (jax.vmap(one) if stacked else one)(mine)
      elif not name.endswith(PARTS):
        out[name] = value
    return out

  return {name: merge(node, is_stacked({name: node})) for name, node in params.items()}
