"""What the engine asks of a model, and the backend for any device that XLA knows.

Keys and values lie in pages of PAGE tokens; a row's table names its pages in order. A decode of
several tokens gathers a row's pages into one contiguous cache, works on that, and writes the new
entries back: the model needs to know nothing of pages.

Bits: under XLA they depend on the shape of a call. Prefill runs one row at a time in calls whose
width follows from how much of the row is left, so that neighbours change nothing; which tokens are
computed and which are found in the cache still does, in the last bits. `rome.models.native` (CPUs)
has no such dependence, and `rome.rollout.engine.exact` removes it on every device.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rome import models
from rome.models import lora, native
from rome.models.layout import is_stacked, stages, unstack_layers
from rome.rollout.engine.prefixes import PAGE

_WIDTHS = (32, 256)  # tokens of a prefill call
_CAST_AT_USE = ("bias", "down_proj", "embedding", "gate_up_proj", "kernel")


@dataclasses.dataclass(frozen=True)
class Job:
  """Context tokens of one row to be computed: they lie at `start` and the places behind it.

  `before` are the tokens in front of `start` that share its page.
  """

  row: int
  start: int
  tokens: Sequence[int]
  before: Sequence[int] = ()


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


class Backend(Protocol):
  """One way to run a model. Hashable: traced functions close over it.

  Pages are a pytree with `choices` [P, PAGE, S, K], the experts that the router chose; the rest is
  the backend's own. `open`, `extend` and `close` are traced into the engine's decode program.
  """

  @property
  def name(self) -> str: ...

  @property
  def compiler_options(self) -> tuple[tuple[str, Any], ...]:
    """Of the decode program, as (name, value)."""

  @property
  def config(self) -> models.ModelConfig: ...

  def prepare(self, params: chex.ArrayTree) -> Any:
    """Parameters as the other methods take them."""

  def init_pages(self, count: int) -> Any:
    """Empty pages."""

  def copy(self, pages: Any, source: np.ndarray, target: np.ndarray) -> Any:
    """Copies pages onto others; targets beyond the last page are dropped."""

  def prefill(self, params: Any, pages: Any, jobs: Sequence[Job], table: np.ndarray) -> Any:
    """Computes keys and values of context tokens."""

  def open(self, pages: Any, table_SxM: Any, start_S: Any, tail_SxT: Any) -> Any:
    """What a decode carries. `start` is where each row goes on, `tail` its last page's tokens."""

  def extend(
    self, params: Any, carry: Any, token_S: Any, place_S: Any, active_S: Any
  ) -> tuple[Any, Any]:
    """Takes one token a row at its place: logits [S, V] of what follows, and the new carry."""

  def close(self, carry: Any) -> Any:
    """The pages with what was computed."""


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

  def _axis(self, stacked: bool) -> int:
    return 1 if stacked else 0

  def _gather(self, pages: Pages, table_BxM: Any, length_B: Any) -> models.Cache:
    """The rows' pages, one behind the other."""

    def rows(x: Any, stacked: bool) -> Any:
      y = jnp.take(x, table_BxM, axis=self._axis(stacked))
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


@dataclasses.dataclass(frozen=True)
class NativeBackend:
  """`rome.models.native`, on CPUs: a token's bits depend on its own context alone.

  Attributes:
    config: the model's sizes.
    max_length: tokens that a row may have.
    width: tokens of a prefill call.
  """

  config: models.ModelConfig
  max_length: int
  width: int = 256
  name: str = "native"
  compiler_options: tuple[tuple[str, Any], ...] = ()

  def prepare(self, params: chex.ArrayTree) -> Any:
    return _pack(self, params)

  def init_pages(self, count: int) -> Any:
    return native.init_pages(self.config, count)

  def copy(self, pages: Any, source: np.ndarray, target: np.ndarray) -> Any:
    return _native_copy(pages, source, target)

  def prefill(self, params: Any, pages: Any, jobs: Sequence[Job], table: np.ndarray) -> Any:
    tokens = np.concatenate([np.asarray(job.tokens, np.int32) for job in jobs])
    rows = np.concatenate([np.full(len(job.tokens), job.row, np.int32) for job in jobs])
    places = np.concatenate(
      [np.arange(job.start, job.start + len(job.tokens), dtype=np.int32) for job in jobs]
    )
    for at in range(0, len(tokens), self.width):
      part = slice(at, at + self.width)
      pad = (0, self.width - len(tokens[part]))
      pages = _native_prefill(
        self,
        params,
        pages,
        np.pad(tokens[part], pad),
        np.pad(rows[part], pad),
        np.pad(places[part], pad, constant_values=-1),
        table,
      )
    return pages

  def open(self, pages: Any, table_SxM: Any, start_S: Any, tail_SxT: Any) -> Any:
    del start_S, tail_SxT
    return pages, table_SxM

  def extend(
    self, params: Any, carry: Any, token_S: Any, place_S: Any, active_S: Any
  ) -> tuple[Any, Any]:
    pages, table = carry
    rows = jnp.arange(len(token_S), dtype=jnp.int32)
    places = jnp.where(active_S, place_S, -1)
    hidden, pages = native.extend(self.config, params, pages, token_S, rows, places, table)
    return native.logits(self.config, params, hidden, active_S), (pages, table)

  def close(self, carry: Any) -> Any:
    return carry[0]


@functools.partial(jax.jit, static_argnums=0)
def _pack(backend: NativeBackend, params: chex.ArrayTree) -> Any:
  return native.pack(backend.config, params, backend.max_length)


@functools.partial(jax.jit, donate_argnums=0)
def _native_copy(pages: Any, source: Any, target: Any) -> Any:
  return native.copy_pages(pages, source, target)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _native_prefill(
  backend: NativeBackend, params: Any, pages: Any, tokens: Any, rows: Any, places: Any, table: Any
) -> Any:
  return native.extend(backend.config, params, pages, tokens, rows, places, table)[1]


def _exact(
  config: models.ModelConfig, compute: models.Compute, stacked: bool, steps: int
) -> Backend:
  from rome.rollout.engine.exact import ExactBackend  # which builds on this module

  return ExactBackend(config, compute, stacked, steps)


def _shapes(tree: chex.ArrayTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path): x.shape for path, x in leaves}


@functools.cache
def _shapes_of(config: models.ModelConfig) -> dict[str, tuple[int, ...]]:
  init = functools.partial(models.init_params, config)
  return _shapes(jax.eval_shape(init, jax.random.key(0)))


def check_params(config: models.ModelConfig, params: chex.ArrayTree) -> None:
  """Checks parameters, stacked or not, adapters or none, against the model's sizes.

  Raises:
    ValueError: they are of another model; the message names the first array that differs.
  """

  def plain(params: chex.ArrayTree) -> chex.ArrayTree:
    params = lora.merge_lora(params) if lora.has_lora(params) else params
    return unstack_layers(config, params) if is_stacked(params) else params

  want = _shapes_of(config)
  try:
    have = _shapes(jax.eval_shape(plain, params))
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"parameters of another model than config: {error!r}") from None
  for name in sorted(want.keys() | have.keys()):
    if want.get(name) != have.get(name):
      raise ValueError(
        f"parameters of another model than config: {name} is {have.get(name, 'missing')}, "
        f"config wants {want.get(name, 'none')}"
      )


def choose(
  config: models.ModelConfig,
  numerics: str,
  name: str,
  compute: models.Compute | None,
  stacked: bool,
  steps: int,
  max_length: int,
) -> Backend:
  """The backend that serves these settings; see `rome.rollout.engine.Engine`.

  Raises:
    ValueError: none does; the message names the setting.
  """
  if numerics not in ("fast", "exact"):
    raise ValueError(f'numerics must be "fast" or "exact", got {numerics!r}')
  if name not in ("auto", "native", "xla"):
    raise ValueError(f'backend must be "auto", "native" or "xla", got {name!r}')
  xla_compute = compute or models.config.ROW_COMPUTE
  if numerics == "exact":
    if name != "auto":
      raise ValueError(f'backend={name!r} is for numerics="fast"; "exact" has one of its own')
    return _exact(config, xla_compute, stacked, steps)
  if name == "xla":
    return XlaBackend(config, xla_compute, stacked, steps)
  why_not = native.unavailable(config, compute or models.config.ROW_COMPUTE)
  if why_not is None:
    return NativeBackend(config, max_length)
  if name == "native":
    raise ValueError(f'backend="native" cannot serve this: {why_not}')
  return XlaBackend(config, xla_compute, stacked, steps)
