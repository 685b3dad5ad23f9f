"""The backend for CPUs: `rome.models.native`.

A token's bits depend on its own context alone: not on the slot, nor on neighbours, nor on what was
found in the cache.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rome import models
from rome.models import native
from rome.rollout.engine.backend import Job


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
