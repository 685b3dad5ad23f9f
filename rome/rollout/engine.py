"""Batched generation over fixed slots with per-row lengths.

Every device call has a constant shape: `prefill` appends up to `tile` context tokens to each row;
`decode` advances every row by up to `steps` tokens, first the rest of its context and then sampled
ones, so that short observations ride along with the other rows' sampling. Which call takes a
context token follows from the length of that context alone: a row's tokens and log-probs depend on
its slot, its context and its key, and a run replays bit for bit whatever the timing of the
environments. The key of a token is fold_in(key, (episode, chunk, token)).

Left out for now: prefix sharing, requests that choose their own slot or sampling settings,
streaming.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from rome import models


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _prefill(
  config: models.ModelConfig,
  params: chex.ArrayTree,
  cache: models.Cache,
  logits_SxV: chex.Array,
  tokens_SxW: chex.Array,
  counts_S: chex.Array,
) -> tuple[models.Cache, chex.Array]:
  new, cache, _ = models.extend(config, params, cache, tokens_SxW, counts_S)
  return cache, jnp.where((counts_S > 0)[:, None], new, logits_SxV)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def _decode(
  config: models.ModelConfig,
  sampling: models.Sampling,
  params: chex.ArrayTree,
  cache: models.Cache,
  logits_SxV: chex.Array,
  key: chex.PRNGKey,
  stop: int,
  context_SxI: chex.Array,
  known_S: chex.Array,
  episode_S: chex.Array,
  chunk_S: chex.Array,
  index_S: chex.Array,
  left_S: chex.Array,
) -> tuple[models.Cache, chex.Array, chex.Array, chex.Array, chex.Array]:
  """Advances the rows with `left_S` > 0 by up to I tokens.

  These are a row's `known_S` context tokens, then sampled ones. A row ends on `stop` or when none
  are left to sample. Returns the cache, logits, what is left to sample [S], the sampled tokens
  [S, I] (-1 where none) and their log-probs [S, I].
  """
  slots, steps = context_SxI.shape
  fold = jax.vmap(jax.random.fold_in)
  keys_S = fold(jax.vmap(lambda e: jax.random.fold_in(key, e))(episode_S), chunk_S)

  def body(carry: tuple) -> tuple:
    i, cache, logits, left, tokens, logps = carry
    active, forced = left > 0, i < known_S
    logp = models.distribution(logits, sampling)
    drawn = jax.vmap(jax.random.categorical)(fold(keys_S, index_S + i - known_S), logp)
    token = jnp.where(forced, context_SxI[:, i], drawn.astype(jnp.int32))
    sampled = active & ~forced
    tokens = tokens.at[:, i].set(jnp.where(sampled, token, -1))
    logps = logps.at[:, i].set(jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0])
    new, cache, _ = models.extend(config, params, cache, token[:, None], active.astype(jnp.int32))
    left = jnp.where(sampled, jnp.where(token == stop, 0, left - 1), left)
    return i + 1, cache, jnp.where(active[:, None], new, logits), left, tokens, logps

  tokens, logps = jnp.full((slots, steps), -1, jnp.int32), jnp.zeros((slots, steps))
  carry: tuple = (0, cache, logits_SxV, left_S, tokens, logps)
  carry = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[3] > 0), body, carry)
  return carry[1:]


@dataclasses.dataclass
class _Row:
  """Host-side state of one slot."""

  episode: int = 0
  chunk: int = -1
  length: int = 0
  pending: list[int] = dataclasses.field(default_factory=list)
  left: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  logps: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Reply:
  """One finished LLM call.

  Attributes:
    slot: the row that it ran in.
    tokens: sampled ids, the stop token included if it was sampled.
    logps: their log-probs in nats.
  """

  slot: int
  tokens: list[int]
  logps: list[float]


class Engine:
  """Generates replies in `slots` rows at once.

  Args:
    config: the model's sizes.
    sampling: the distribution to draw from.
    slots: rows.
    cache_length: context tokens a row can hold.
    stop: the token id that ends a reply.
    tile: context tokens a prefill appends to a row; shorter contexts need none.
    steps: tokens a decode advances a row by.
  """

  def __init__(
    self,
    config: models.ModelConfig,
    sampling: models.Sampling,
    *,
    slots: int,
    cache_length: int,
    stop: int,
    tile: int = 32,
    steps: int = 8,
  ):
    self.slots, self.cache_length = slots, cache_length
    self._config, self._sampling = config, sampling
    self._stop, self._tile, self._steps = stop, tile, steps
    self._params: chex.ArrayTree | None = None
    self._key: chex.PRNGKey | None = None
    self.sampled_tokens = 0
    self.context_tokens = 0

  def load(self, params: chex.ArrayTree, key: chex.PRNGKey) -> None:
    """Takes new weights and a new base key; every row is emptied."""
    self._params, self._key = params, key
    self._cache = models.init_cache(self._config, self.slots, self.cache_length)
    self._logits = jnp.zeros((self.slots, self._config.vocab_size))
    self._rows = [_Row() for _ in range(self.slots)]

  def start(self, slot: int, episode: int) -> None:
    """Empties a row for a new episode, whose number keys its randomness."""
    self._rows[slot] = _Row(episode=episode)
    emptied = self._cache.length.at[slot].set(0)
    self._cache = dataclasses.replace(self._cache, length=emptied)

  def room(self, slot: int) -> int:
    """Context tokens that the row can still take."""
    return self.cache_length - self._rows[slot].length

  def ask(self, slot: int, context: Sequence[int], max_tokens: int) -> None:
    """Appends `context` to a row and asks for its next reply of at most `max_tokens` tokens.

    Raises:
      ValueError: the row cannot hold them, or it is still busy.
    """
    row = self._rows[slot]
    if row.left:
      raise ValueError(f"slot {slot} is still generating")
    if not context or max_tokens < 1 or len(context) + max_tokens > self.room(slot):
      raise ValueError(
        f"slot {slot} has room for {self.room(slot)} tokens, "
        f"asked for {len(context)} + {max_tokens}"
      )
    row.pending = list(context)
    row.chunk += 1
    row.left, row.tokens, row.logps = max_tokens, [], []
    row.length += len(context)

  @property
  def busy(self) -> bool:
    return any(row.left for row in self._rows)

  def step(self) -> list[Reply]:
    """One round of device calls; returns the replies that it finished."""
    deep = sum(len(row.pending) > self._tile for row in self._rows)
    shallow = any(row.left and len(row.pending) <= self._tile for row in self._rows)
    # A prefill costs about the same for one row as for all, so a few long contexts wait for
    # company.
    if deep and (not shallow or 4 * deep >= self.slots):
      self._prefill_round()
    return self._decode_round() if shallow else []

  def _prefill_round(self) -> None:
    tokens = np.zeros((self.slots, self._tile), np.int32)
    counts = np.zeros(self.slots, np.int32)
    for s, row in enumerate(self._rows):
      if len(row.pending) > self._tile:
        tokens[s], row.pending = row.pending[: self._tile], row.pending[self._tile :]
        counts[s] = self._tile
    self._cache, self._logits = _prefill(
      self._config, self._params, self._cache, self._logits, tokens, counts
    )
    self.context_tokens += int(counts.sum())

  def _decode_round(self) -> list[Reply]:
    rows = self._rows
    left = np.array([row.left if len(row.pending) <= self._tile else 0 for row in rows], np.int32)
    context = np.zeros((self.slots, self._steps), np.int32)
    known = np.zeros(self.slots, np.int32)
    for s, row in enumerate(rows):
      if left[s]:
        part, row.pending = row.pending[: self._steps], row.pending[self._steps :]
        known[s] = len(part)
        context[s, : len(part)] = part
    self.context_tokens += int(known.sum())

    def field(read: Callable[[_Row], int]) -> np.ndarray:
      return np.array([read(row) for row in rows], np.int32)

    self._cache, self._logits, new_left, tokens, logps = _decode(
      self._config,
      self._sampling,
      self._params,
      self._cache,
      self._logits,
      self._key,
      self._stop,
      context,
      known,
      field(lambda r: r.episode),
      field(lambda r: max(r.chunk, 0)),
      field(lambda r: len(r.tokens)),
      left,
    )
    new_left, tokens, logps = np.asarray(new_left), np.asarray(tokens), np.asarray(logps)
    replies = []
    for s, row in enumerate(rows):
      if not left[s]:
        continue
      sampled = tokens[s] >= 0
      row.tokens += tokens[s, sampled].tolist()
      row.logps += logps[s, sampled].tolist()
      n = int(sampled.sum())
      row.length += n
      row.left = int(new_left[s])
      self.sampled_tokens += n
      if not row.left:
        replies.append(Reply(s, row.tokens, row.logps))
    return replies
