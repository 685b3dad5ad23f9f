"""The optimiser's update, a piece at a time; between updates its state may lie in host memory.

A piece is what one key of the parameters holds: a layer, the embedding. Each has a program of its
own. New weights take the memory of the gradient, and the optimiser's state is updated in place.

AdamW's moments are twice as large as the weights, and only the update reads them. With
`config.offload_optimizer` each array of them lies in pinned memory of the host of its device, split
as on the device; the program of a piece copies it to the device and back, so that a device never
holds more than one piece. The bits are those of an update on the device.

Choice: pieces, since a program for all of them brings all moments to the device at once (so it is
compiled for TPUs), and only the gradients of long rows would have gained anything. Pieces without
host memory too, since two ways to cut it round differently.

Choice: scalars, the optimiser's counts, stay on the device: they save nothing.

Left out: transfers of one piece while another is computed; weights and gradients in host memory.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import chex
import jax
import optax

from rome.models import lora
from rome.train.state import TrainState

HOST = "pinned_host"


def to_host(state: TrainState) -> TrainState:
  """The state with its optimiser's arrays in host memory.

  All of it is committed to its devices, since what an update computes from committed arrays is, and
  jit would compile the gradient again for that.
  """

  def put(x: jax.Array, kind: str) -> jax.Array:
    return jax.device_put(x, x.sharding.with_memory_kind(kind))

  stays = jax.tree.map(
    lambda x: jax.device_put(x, x.sharding), dataclasses.replace(state, opt_state=())
  )
  moved = jax.tree.map(lambda x: put(x, HOST) if x.ndim else put(x, "device"), state.opt_state)
  return dataclasses.replace(stays, opt_state=moved)


def in_host_memory(opt_state: optax.OptState) -> bool:
  """Whether it lies where `to_host` puts it."""
  return any(x.sharding.memory_kind == HOST for x in jax.tree.leaves(opt_state))


def piece_bytes(params: dict, opt_state: optax.OptState) -> int:
  """Bytes of the largest piece of the optimiser's state; arrays may be abstract."""
  trainable, _ = lora.split(params)
  moments, _, _ = _take_apart(opt_state, jax.tree.structure(trainable))
  return max(
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves([m[key] for m in moments]))
    for key in trainable
  )


def apply(
  optimizer: optax.GradientTransformation,
  params: dict,
  opt_state: optax.OptState,
  grads: dict,
  norm: chex.Array,
) -> tuple[dict, optax.OptState]:
  """One update; the optimiser's state is afterwards where it was.

  Args:
    optimizer: that computes each array alone, from its gradient and the norm of all of them, as
      `rome.train.state.make_optimizer`.
    params: arrays, which stay.
    opt_state: taken over, like `grads`. In host memory only with all arguments committed.
    grads: of what trains.
    norm: of `grads`, a scalar.
  """
  made = {
    key: program(*piece)
    for key, program, piece in pieces(optimizer, params, opt_state, grads, norm)
  }
  trainable, frozen = lora.split(params)
  old, _, outer = _take_apart(opt_state, jax.tree.structure(trainable))
  moments = [{key: made[key][1][i] for key in made} for i in range(len(old))]
  _, _, others = next(iter(made.values()))  # the same of all pieces
  new = {key: weights for key, (weights, _, _) in made.items()}
  return lora.join(new, frozen), _put_together(outer, moments, others)


def pieces(
  optimizer: optax.GradientTransformation,
  params: dict,
  opt_state: optax.OptState,
  grads: dict,
  norm: chex.Array,
) -> Iterator[tuple[str, Any, tuple]]:
  """Key, program and arguments of each piece of `apply`; all may be abstract."""
  trainable, _ = lora.split(params)
  moments, others, outer = _take_apart(opt_state, jax.tree.structure(trainable))
  away = in_host_memory(opt_state)
  for key in trainable:
    piece = trainable[key], [m[key] for m in moments], others, grads[key], norm
    yield key, update_program(optimizer, outer, _places(piece) if away else None), piece


# Where the arrays like the parameters stand in an optimiser's state, and its structure around them.
Outer = tuple[tuple[bool, ...], Any]


def _take_apart(opt_state: optax.OptState, like: Any) -> tuple[list, list, Outer]:
  """Trees like the parameters (moments), the other leaves (counts), and the structure of both."""
  nodes, outer = jax.tree.flatten(opt_state, is_leaf=lambda x: jax.tree.structure(x) == like)
  mirrors = tuple(jax.tree.structure(node) == like for node in nodes)
  moments = [node for node, mirror in zip(nodes, mirrors, strict=True) if mirror]
  others = [node for node, mirror in zip(nodes, mirrors, strict=True) if not mirror]
  return moments, others, (mirrors, outer)


def _put_together(outer: Outer, moments: list, others: list) -> optax.OptState:
  mirrors, structure = outer
  left, right = iter(moments), iter(others)
  return jax.tree.unflatten(structure, [next(left if mirror else right) for mirror in mirrors])


Places = tuple[tuple[jax.sharding.Sharding, ...], Any]  # a tree of them, flattened


def _places(tree: chex.ArrayTree) -> Places:
  leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, tree))
  return tuple(leaves), structure


@functools.cache
def update_program(
  optimizer: optax.GradientTransformation, outer: Outer, places: Places | None
) -> Any:
  """The jitted update of a piece: (params, moments, others, grads, norm) -> the first three.

  Args:
    optimizer: as in `apply`.
    outer: the structure of its state.
    places: of the arguments, where moments are in host memory; outputs lie where their arguments
      did. Unless jit is told every single one, it may write weights over moments of their shape, in
      host memory.
  """

  def apply_piece(params: Any, moments: list, others: list, grads: Any, norm: chex.Array) -> Any:
    if places:
      moments = jax.device_put(moments, jax.memory.Space.Device)
    opt_state = _put_together(outer, moments, others)
    transform = optax.with_extra_args_support(optimizer)
    updates, opt_state = transform.update(grads, opt_state, params, norm=norm)
    moments, others, _ = _take_apart(opt_state, jax.tree.structure(params))
    return optax.apply_updates(params, updates), moments, others

  if not places:
    return jax.jit(apply_piece, donate_argnums=(1, 3))
  ins = jax.tree.unflatten(places[1], places[0])
  return jax.jit(apply_piece, donate_argnums=(1, 3), in_shardings=ins, out_shardings=ins[:3])
