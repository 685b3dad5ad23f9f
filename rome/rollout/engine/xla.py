"""The backend for any device that XLA knows: `rome.models.extend` on pages.

A decode of several tokens gathers a row's pages into one contiguous cache, works on that, and
writes the new entries back: the model needs to know nothing of pages.

Bits depend on the shape of a call. Prefill runs one row at a time in calls whose width follows from
how much of the row is left, so that neighbours change nothing; which tokens are computed and which
are found in the cache still does, in the last bits.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rome import models
from rome.models.layout import stages
from rome.rollout.engine.backend import Job
from rome.rollout.engine.prefixes import PAGE

_WIDTHS = (32, 256)  # tokens of a prefill call
_CAST_AT_USE = ("bias", "down_proj", "embedding", "gate_up_proj", "kernel")


@struct.dataclass
class Pages:
  """Keys, values and the router's choices, P pages of PAGE tokens.

  Attributes:
    k, v: tuples of [P, PAGE, G, H], one a layer, or [layers, P, PAGE, G, H], one a stack of layers.
    choices: [P, PAGE, S, K] int32.
  """

  k: tuple
  v: tuple
  choices: jax.Array


@dataclasses.dataclass(frozen=True)
class XlaBackend:
  """`rome.models.extend`, on any device.

  Attributes:
    config: the model's sizes.
    compute: how it is computed.
    stacked: whether parameters are stacked.
    steps: tokens of a decode.
  """

  config: models.ModelConfig
  compute: models.Compute
  stacked: bool
  steps: int
  name: str = "xla"
  compiler_options: tuple[tuple[str, Any], ...] = ()

  def prepare(self, params: chex.ArrayTree) -> Any:
    return _cast(self.compute.dtype, params)

  def init_pages(self, count: int) -> Pages:
    c = self.config
    cache = models.init_cache(c, count, PAGE, self.stacked, self.compute.dtype)
    sparse = sum(c.is_sparse(i) for i in range(c.num_hidden_layers))
    choices = jnp.zeros((count, PAGE, sparse, c.num_experts_per_tok), jnp.int32)
    return Pages(k=cache.k, v=cache.v, choices=choices)

  def copy(self, pages: Pages, source: np.ndarray, target: np.ndarray) -> Pages:
    return _copy(self, pages, source, target)

  def prefill(self, params: Any, pages: Pages, jobs: Sequence[Job], table: np.ndarray) -> Pages:
    for job in jobs:
      at = 0
      while at < len(job.tokens):
        left = len(job.tokens) - at
        width = next((w for w in _WIDTHS if left <= w), _WIDTHS[-1])
        block = np.zeros((1, width), np.int32)
        count = min(width, left)
        block[0, :count] = job.tokens[at : at + count]
        rows = table[job.row : job.row + 1]
        start = np.array([job.start + at], np.int32)
        pages = _prefill(self, params, pages, block, start, np.array([count], np.int32), rows)
        at += count
    return pages

  def open(self, pages: Pages, table_SxM: Any, start_S: Any, tail_SxT: Any) -> dict:
    del tail_SxT
    return {
      "pages": pages,
      "table": table_SxM,
      "start": start_S,
      "cache": self._gather(pages, table_SxM, start_S),
      "choices": jnp.zeros((len(start_S), self.steps, *pages.choices.shape[2:]), jnp.int32),
      "counts": jnp.zeros_like(start_S),
    }

  def extend(
    self, params: Any, carry: dict, token_S: Any, place_S: Any, active_S: Any
  ) -> tuple[Any, dict]:
    cache = dataclasses.replace(carry["cache"], length=place_S)
    active = active_S.astype(jnp.int32)
    logits, cache, stats = models.extend(
      self.config, params, cache, token_S[:, None], active, self.compute
    )
    new = carry | {"cache": cache, "counts": carry["counts"] + active}
    if "choices" in stats:
      rows = jnp.arange(len(token_S))
      chosen = jnp.moveaxis(stats["choices"][:, :, 0], 0, 1)
      # Rows that are not active have counts of their own, which are never read.
      new["choices"] = carry["choices"].at[rows, carry["counts"]].set(chosen, mode="drop")
    return logits, new

  def close(self, carry: dict) -> Pages:
    offsets = jnp.arange(self.steps)[None]
    place_SxI = carry["start"][:, None] + offsets
    real = offsets < carry["counts"][:, None]
    return self._scatter(
      carry["pages"], carry["cache"], carry["choices"], carry["table"], place_SxI, real
    )

  def _gather(self, pages: Pages, table_BxM: Any, length_B: Any) -> models.Cache:
    """The rows' pages, one behind the other."""

    def rows(x: Any, stacked: bool) -> Any:
      y = jnp.take(x, table_BxM, axis=int(stacked))
      shape = (*table_BxM.shape[:1], table_BxM.shape[1] * PAGE, *x.shape[-2:])
      return y.reshape((*x.shape[:1], *shape) if stacked else shape)

    parts = [stage.stacked for stage in stages(self.config, self.stacked)]
    k, v = (
      tuple(rows(x, stacked) for x, stacked in zip(getattr(pages, name), parts, strict=True))
      for name in ("k", "v")
    )
    return models.Cache(k=k, v=v, length=length_B)

  def _scatter(
    self, pages: Pages, cache: models.Cache, choices: Any, table_BxM: Any, place_BxI: Any, real: Any
  ) -> Pages:
    """Writes the entries at `place` of each row into its pages."""
    index = jnp.minimum(place_BxI // PAGE, table_BxM.shape[1] - 1)
    page = jnp.take_along_axis(table_BxM, index, axis=1)
    page = jnp.where(real, page, pages.choices.shape[0])  # beyond the last one: dropped
    offset = place_BxI % PAGE
    rows = jnp.arange(len(place_BxI))[:, None]

    def put(x: Any, new: Any, stacked: bool) -> Any:
      if stacked:
        return x.at[:, page, offset].set(new[:, rows, place_BxI], mode="drop")
      return x.at[page, offset].set(new[rows, place_BxI], mode="drop")

    parts = [stage.stacked for stage in stages(self.config, self.stacked)]
    return Pages(
      k=tuple(map(put, pages.k, cache.k, parts)),
      v=tuple(map(put, pages.v, cache.v, parts)),
      choices=pages.choices.at[page, offset].set(choices, mode="drop"),
    )


@functools.partial(jax.jit, static_argnums=0)
def _cast(dtype: str, params: chex.ArrayTree) -> chex.ArrayTree:
  """What the model would cast at every use is cast once: half the reading.

  The same numbers, but where XLA keeps excess precision and leaves the casts out.
  """

  def cast(path: tuple, x: chex.Array) -> chex.Array:
    # A jitted function hands an argument that it returns through: whoever donates `params` later
    # would delete it.
    return x.astype(dtype) if path[-1].key in _CAST_AT_USE else jnp.copy(x)

  return jax.tree_util.tree_map_with_path(cast, params)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _copy(backend: XlaBackend, pages: Pages, source: Any, target: Any) -> Pages:
  parts = [stage.stacked for stage in stages(backend.config, backend.stacked)]

  def copied(x: Any, stacked: bool) -> Any:
    if stacked:
      return x.at[:, target].set(x[:, source], mode="drop")
    return x.at[target].set(x[source], mode="drop")

  return Pages(
    k=tuple(map(copied, pages.k, parts)),
    v=tuple(map(copied, pages.v, parts)),
    choices=copied(pages.choices, False),
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _prefill(
  backend: XlaBackend, params: Any, pages: Pages, block: Any, start: Any, count: Any, table: Any
) -> Pages:
  cache = backend._gather(pages, table, start)
  _, cache, stats = models.extend(backend.config, params, cache, block, count, backend.compute)
  offsets = jnp.arange(block.shape[1])[None]
  choices = jnp.zeros((*block.shape, *pages.choices.shape[2:]), jnp.int32)
  if "choices" in stats:
    choices = jnp.moveaxis(stats["choices"], 0, 2)
  place = start[:, None] + offsets
  return backend._scatter(pages, cache, choices, table, place, offsets < count[:, None])
