"""The exact backend: log-probs of replies are, bit for bit, those that training computes.

Every device call has the shape that training has too (`rome.models.exact`): all slots, one tile of
a page, caches of one length. A decode computes a row's newest page again for every token, PAGE
times the work of the ordinary one; in return keys and values of a page follow from the tokens up to
its end alone. A page that was shared, copied or computed again has the same bits, and so has a
reply, whatever ran beside it.

Left out: everything that would change shapes, such as short rows in short caches.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rome.models import exact
from rome.rollout.engine.backend import Job
from rome.rollout.engine.prefixes import PAGE
from rome.rollout.engine.xla import Pages, XlaBackend

assert PAGE == exact.TILE


@dataclasses.dataclass(frozen=True)
class ExactBackend(XlaBackend):
  """`rome.models.exact` on pages; attributes as of `XlaBackend`.

  Raises:
    ValueError: the experts' bits would depend on neighbours.
  """

  name: str = "exact"
  compiler_options: tuple[tuple[str, Any], ...] = tuple(exact.COMPILER_OPTIONS.items())

  def __post_init__(self) -> None:
    if self.compute.experts != "dense":
      raise ValueError(
        f'numerics="exact" needs compute.experts="dense", got "{self.compute.experts}": with '
        "others the bits of a row depend on its neighbours"
      )

  def prepare(self, params: chex.ArrayTree) -> Any:
    # As training has them: casts are part of the program. Copies, as training may donate its own.
    return jax.tree.map(jnp.copy, params)

  def prefill(self, params: Any, pages: Pages, jobs: Sequence[Job], table: np.ndarray) -> Pages:
    slots, length = len(table), table.shape[1] * PAGE
    chex.assert_equal(len({job.row for job in jobs}), len(jobs))
    tokens = np.zeros((slots, length), np.int32)
    start, end = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    for job in jobs:
      first, last = job.start - len(job.before), job.start + len(job.tokens)
      tokens[job.row, first:last] = [*job.before, *job.tokens]
      start[job.row], end[job.row] = job.start, last
    return _prefill(self, params, pages, table, tokens, start, end)

  def open(self, pages: Pages, table_SxM: Any, start_S: Any, tail_SxT: Any) -> dict:
    return super().open(pages, table_SxM, start_S, tail_SxT) | {"tail": jnp.asarray(tail_SxT)}

  def extend(
    self, params: Any, carry: dict, token_S: Any, place_S: Any, active_S: Any
  ) -> tuple[Any, dict]:
    rows, inside = jnp.arange(len(token_S)), place_S % PAGE
    # What a new page finds here of the last one is padding to it.
    tail = carry["tail"].at[rows, jnp.where(active_S, inside, PAGE)].set(token_S, mode="drop")
    cache = dataclasses.replace(carry["cache"], length=place_S - inside)
    counts = jnp.where(active_S, inside + 1, 0)
    hidden, cache, stats = exact.tile_hidden(self.config, self.compute, params, cache, tail, counts)
    logits = exact.place_logits(self.config, params, hidden[rows, inside])
    new = carry | {"cache": cache, "tail": tail, "counts": carry["counts"] + active_S}
    if "choices" in stats:
      chosen = jnp.moveaxis(stats["choices"][:, rows, inside], 0, 1)
      # Rows that are not active have counts of their own, which are never read.
      new["choices"] = carry["choices"].at[rows, carry["counts"]].set(chosen, mode="drop")
    return logits, new


@functools.partial(
  jax.jit, static_argnums=0, donate_argnums=2, compiler_options=exact.COMPILER_OPTIONS
)
def _prefill(
  backend: ExactBackend,
  params: Any,
  pages: Pages,
  table_SxM: chex.Array,
  tokens_SxL: chex.Array,
  start_S: chex.Array,
  end_S: chex.Array,
) -> Pages:
  """Computes the places from `start` to `end` of each row, page by page from the one of `start`."""
  slots, length = tokens_SxL.shape
  rows, offsets = jnp.arange(slots)[:, None], jnp.arange(PAGE)[None]
  first_S = start_S - start_S % PAGE
  choices = jnp.zeros((slots, length, *pages.choices.shape[2:]), jnp.int32)

  def step(carry: tuple) -> tuple:
    i, cache, choices = carry
    begin_S = first_S + i * PAGE
    counts = jnp.clip(end_S - begin_S, 0, PAGE)
    place_SxT = begin_S[:, None] + offsets
    tile = tokens_SxL[rows, jnp.minimum(place_SxT, length - 1)]
    cache = dataclasses.replace(cache, length=jnp.minimum(begin_S, length - PAGE))
    _, cache, stats = exact.tile_hidden(
      backend.config, backend.compute, params, cache, tile, counts
    )
    if "choices" in stats:
      place_SxT = jnp.where(offsets < counts[:, None], place_SxT, length)
      chosen = jnp.moveaxis(stats["choices"], 0, 2)
      choices = choices.at[rows, place_SxT].set(chosen, mode="drop")
    return i + 1, cache, choices

  def more(carry: tuple) -> chex.Array:
    return jnp.any(first_S + carry[0] * PAGE < end_S)

  carry = (0, backend._gather(pages, table_SxM, first_S), choices)
  _, cache, choices = jax.lax.while_loop(more, step, carry)
  place_SxL = jnp.broadcast_to(jnp.arange(length)[None], (slots, length))
  new = (place_SxL >= start_S[:, None]) & (place_SxL < end_S[:, None])
  return backend._scatter(pages, cache, choices, table_SxM, place_SxL, new)
