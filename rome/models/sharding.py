"""Which array axis lies on which mesh axis: one table, and a mesh that it fits.

A mesh has five axes. `data` copies the parameters, `fsdp` splits their hidden axis and gathers it
where a layer runs, `expert` splits the experts, `tensor` heads, inner widths and the vocabulary;
rows of a batch are split over the first three. `context` splits each row along its length. The
last axis of the mesh varies fastest over neighbouring devices: `tensor` talks most.

The mesh in use is `jax.set_mesh`'s; without one nothing in the model is constrained. Left out:
splitting layers over devices (pipelines), and a rule for each parameter that the caller can change.
"""

import contextlib
import math
import re
from collections.abc import Sequence

import chex
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from rome.models.config import ModelConfig

AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis -> mesh axes that it is split over, where the mesh has them.
RULES: dict[str, tuple[str, ...]] = {
  # Of activations; their residual width is whole on each device.
  "batch": ("data", "fsdp", "expert"),
  "length": ("context",),
  # Of parameters.
  "hidden": ("fsdp",),
  # Of both.
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "mlp": ("tensor",),
  "vocab": ("tensor",),
  "experts": ("expert",),
}

Axes = tuple[str | None, ...]

# Projection -> its batched, input and output axes. A kernel has all three, a bias the outputs, and
# `lora_a` and `lora_b` the inputs and the outputs with the rank between them.
_PROJECTIONS: dict[str, tuple[Axes, Axes, Axes]] = {
  "q_proj": ((), ("hidden",), ("heads", None)),
  "k_proj": ((), ("hidden",), ("kv_heads", None)),
  "v_proj": ((), ("hidden",), ("kv_heads", None)),
  "o_proj": ((), ("heads", None), ("hidden",)),
  "gate_proj": ((), ("hidden",), ("mlp",)),
  "up_proj": ((), ("hidden",), ("mlp",)),
  "down_proj": ((), ("mlp",), ("hidden",)),
  "lm_head": ((), ("hidden",), ("vocab",)),
}
_EXPERTS: dict[str, tuple[Axes, Axes, Axes]] = {
  "router": ((), ("hidden",), (None,)),
  "gate_up_proj": (("experts",), ("hidden",), ("mlp",)),
  "down_proj": (("experts",), ("mlp",), ("hidden",)),
}
_STACK = re.compile(r"layers_\d+_\d+")
_LORA = re.compile(r"(?:(?P<name>\w+)_)?(?P<part>lora_(?:a|b|alpha))")


def make_mesh(
  data: int = 1,
  fsdp: int = -1,
  expert: int = 1,
  context: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of all devices, or of `devices`; at most one size may be -1, which takes the rest.

  Raises:
    ValueError: a size is neither positive nor -1, or the sizes do not multiply to the devices.
  """
  sizes = dict(zip(AXES, (data, fsdp, expert, context, tensor), strict=True))
  count = len(devices) if devices is not None else jax.device_count()
  for name, size in sizes.items():
    if type(size) is not int or (size < 1 and size != -1):
      raise ValueError(f"mesh.{name} must be a positive int, or -1 for the rest, got {size!r}")
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) > 1:
    raise ValueError(f"mesh: only one axis may be -1, got {' and '.join(free)}")
  fixed = math.prod(size for size in sizes.values() if size != -1)
  shown = " * ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "1"
  if count % fixed or (not free and count != fixed):
    raise ValueError(f"mesh: {shown} does not multiply to the {count} devices at hand")
  shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
  kinds = (AxisType.Auto,) * len(AXES)
  try:
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
  except NotImplementedError:  # a torus, no whole axes of which multiply to the sizes: split them
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=kinds)


def axes_spec(axes: Axes, names: Sequence[str]) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes on a mesh with axes `names`."""
  found = [tuple(n for n in RULES[a] if n in names) if a else () for a in axes]
  return PartitionSpec(*(f if len(f) > 1 else f[0] if f else None for f in found))


def spec(*axes: str | None) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes on the mesh in use."""
  return axes_spec(axes, jax.sharding.get_abstract_mesh().axis_names)


def constrain(x: chex.Array, *axes: str | None) -> chex.Array:
  """`x`, laid out on the mesh in use as its logical axes say."""
  return jax.lax.with_sharding_constraint(x, spec(*axes)) if in_use() else x


def in_use() -> bool:
  """Whether there is a mesh that the compiler splits arrays over; not so inside `jax.shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and not mesh.manual_axes


def without_mesh() -> contextlib.AbstractContextManager:
  """A context in which no mesh is in use."""
  return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def mesh_axes(*axes: str | None) -> tuple[str, ...]:
  """The axes of the mesh in use, larger than 1, that split these logical axes."""
  sizes = jax.sharding.get_abstract_mesh().shape
  names = [name for axis in axes if axis for name in RULES[axis] if sizes.get(name, 1) > 1]
  return tuple(dict.fromkeys(names))


def split_count(axis: str, mesh: Mesh | AbstractMesh) -> int:
  """Into how many parts `mesh` splits the logical axis `axis`."""
  return math.prod(mesh.shape.get(name, 1) for name in RULES[axis])


def _leaf_axes(path: Sequence[str], rank: int) -> Axes:
  """Logical axes of the parameter at `path`, keys of the nested dict."""
  name = "/".join(path)
  stacked = any(_STACK.fullmatch(key) for key in path)
  if rank == 0:
    return ()  # counters of an optimiser
  module, leaf = ("", *path)[-2:]
  lora = _LORA.fullmatch(leaf)
  if leaf == "embedding":
    axes: Axes = ("vocab", "hidden")
  elif leaf == "scale":
    axes = (None,)
  elif leaf in _EXPERTS:
    axes = sum(_EXPERTS[leaf], ())
  elif lora:
    batch, inputs, outputs = _projection(lora["name"], module, name)
    parts: dict[str, Axes] = {
      "lora_a": (*batch, *inputs, None),
      "lora_b": (*batch, None, *outputs),
      "lora_alpha": (),
    }
    axes = parts[lora["part"]]
  elif leaf in ("kernel", "bias"):
    batch, inputs, outputs = _projection(None, module, name)
    axes = batch + ((inputs if leaf == "kernel" else ()) + outputs)
  else:
    raise ValueError(f"no sharding rule for parameter {name}")
  axes = (None, *axes) if stacked else axes
  if len(axes) != rank:
    raise ValueError(f"parameter {name} has rank {rank}, its sharding rule is {axes}")
  return axes


def _projection(prefix: str | None, module: str, name: str) -> tuple[Axes, Axes, Axes]:
  found = _EXPERTS.get(prefix) if prefix else _PROJECTIONS.get(module)
  if found is None:
    raise ValueError(f"no sharding rule for parameter {name}")
  return found


def _keys(path: tuple) -> list[str]:
  return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def param_specs(shapes: chex.ArrayTree, mesh: Mesh | AbstractMesh | None = None) -> chex.ArrayTree:
  """The PartitionSpec of every leaf of parameters, or of anything with leaves like theirs.

  Args:
    shapes: a tree of arrays or `jax.ShapeDtypeStruct`: parameters as `init_params` gives them,
      stacked or not, with `lora_a` and `lora_b` or not; or an optimiser's state over them, whose
      scalars are not split.
    mesh: names only the axes that this mesh has; None for all of them.
  Returns:
    the same tree of PartitionSpecs.
  Raises:
    ValueError: a leaf has no rule; the message names it.
  """
  names = AXES if mesh is None else mesh.axis_names

  def one(path: tuple, leaf: chex.Array) -> PartitionSpec:
    return axes_spec(_leaf_axes(_keys(path), len(leaf.shape)), names)

  return jax.tree_util.tree_map_with_path(one, shapes)


def param_shardings(mesh: Mesh | AbstractMesh, shapes: chex.ArrayTree) -> chex.ArrayTree:
  """A NamedSharding on `mesh` for every leaf, see `param_specs`.

  Raises:
    ValueError: a leaf has no rule, or an axis of it does not divide; the message names it.
  """

  def one(path: tuple, leaf: chex.Array) -> NamedSharding:
    axes = _leaf_axes(_keys(path), len(leaf.shape))
    for axis, length in zip(axes, leaf.shape, strict=True):
      if axis and length % split_count(axis, mesh):
        raise ValueError(
          f"parameter {'/'.join(_keys(path))}: its {axis} axis of {length} does not split over "
          f"{_shown(axis, mesh)}"
        )
    return NamedSharding(mesh, axes_spec(axes, mesh.axis_names))

  return jax.tree_util.tree_map_with_path(one, shapes)


def constrain_params(params: chex.ArrayTree) -> chex.ArrayTree:
  """`params`, and in the backward pass their gradients, laid out on the mesh by the table."""
  if not in_use():
    return params
  return jax.tree.map(
    jax.lax.with_sharding_constraint,
    params,
    param_specs(params, jax.sharding.get_abstract_mesh()),
  )


def _shown(axis: str, mesh: Mesh | AbstractMesh) -> str:
  sizes = [(name, mesh.shape.get(name, 1)) for name in RULES[axis]]
  return " * ".join(f"{name}={size}" for name, size in sizes if size > 1)


def check_mesh(
  config: ModelConfig, mesh: Mesh | AbstractMesh, batch: int, length: int | None = None
) -> None:
  """Raises ValueError, naming the setting, where `mesh` does not divide a model and its batch.

  Args:
    config: the model's sizes.
    mesh: where it will run.
    batch: rows of a micro-batch.
    length: tokens a row; None where rows are not split, as in a cache.
  """
  wanted = [
    ("hidden", "model.hidden_size", config.hidden_size),
    ("heads", "model.num_attention_heads", config.num_attention_heads),
    ("kv_heads", "model.num_key_value_heads", config.num_key_value_heads),
    ("vocab", "model.vocab_size", config.vocab_size),
    ("batch", "the batch", batch),
  ]
  sparse = [config.is_sparse(i) for i in range(config.num_hidden_layers)]
  if any(sparse):
    wanted += [
      ("experts", "model.num_experts", config.num_experts),
      ("mlp", "model.moe_intermediate_size", config.moe_intermediate_size),
      ("mlp", "model.hidden_size", config.hidden_size),  # partial sums of experts are scattered
    ]
  elif split_count("experts", mesh) > 1:
    raise ValueError(f"{_shown('experts', mesh)}: the model has no experts to split")
  if not all(sparse):
    wanted.append(("mlp", "model.intermediate_size", config.intermediate_size))
  for axis, name, size in wanted:
    if size % split_count(axis, mesh):
      raise ValueError(f"{name} {size} does not split over {_shown(axis, mesh)}")
  context = split_count("length", mesh)
  if length is not None and context > 1 and length % (2 * context):
    raise ValueError(f"the length of a row {length} is no multiple of 2 * context={context}")
