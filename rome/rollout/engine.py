"""Batched generation over fixed slots with per-row lengths.

Every device call has a constant shape: `prefill` appends up to `tile` context tokens to each row, `decode` samples up to
`steps` tokens a row. A row's tokens and log-probs depend on its slot, its context and its key alone, so a run replays bit
for bit whatever the timing of the environments. The key of a token is fold_in(key, (episode, chunk, token)).

Left out for now: prefix sharing, requests that choose their own slot or sampling settings, streaming.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rome import models


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _prefill(config, params, cache, logits_SxV, tokens_SxW, counts_S):
  new, cache = models.extend(config, params, cache, tokens_SxW, counts_S)
  return cache, jnp.where((counts_S > 0)[:, None], new, logits_SxV)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(4, 5))
def _decode(config, sampling, steps, params, cache, logits_SxV, key, stop, episode_S, chunk_S, index_S, left_S):
  """Samples up to `steps` tokens for every row with `left_S` > 0; a row ends on `stop` or when none are left."""

  def body(carry):
    i, cache, logits, left, tokens, logps = carry
    active = left > 0
    fold = jax.vmap(jax.random.fold_in)
    keys = jax.vmap(lambda e: jax.random.fold_in(key, e))(episode_S)
    keys = fold(fold(keys, chunk_S), index_S + i)
    logp = models.distribution(logits, sampling)
    token = jax.vmap(jax.random.categorical)(keys, logp).astype(jnp.int32)
    tokens = tokens.at[:, i].set(jnp.where(active, token, -1))
    logps = logps.at[:, i].set(jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0])
    new, cache = models.extend(config, params, cache, token[:, None], active.astype(jnp.int32))
    left = jnp.where(active & (token != stop), left - 1, 0)
    return i + 1, cache, jnp.where(active[:, None], new, logits), left, tokens, logps

  slots = left_S.shape[0]
  carry = (0, cache, logits_SxV, left_S, jnp.full((slots, steps), -1, jnp.int32), jnp.zeros((slots, steps)))
  carry = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[3] > 0), body, carry)
  _, cache, logits, left, tokens, logps = carry
  return cache, logits, left, tokens, logps


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
  """One finished LLM call: sampled ids (the stop token included if it was sampled) and their log-probs in nats."""

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
    tile: context tokens appended a call.
    steps: tokens sampled a call.
  """

  def __init__(self, config: models.ModelConfig, sampling: models.Sampling, *, slots: int, cache_length: int,
               stop: int, tile: int = 32, steps: int = 8):
    self.slots, self.cache_length = slots, cache_length
    self._config, self._sampling, self._stop, self._tile, self._steps = config, sampling, stop, tile, steps
    self._params = None
    self._key = None
    self.sampled_tokens = 0
    self.prefilled_tokens = 0

  def load(self, params, key) -> None:
    """Takes new weights and a new base key; every row is emptied."""
    self._params, self._key = params, key
    self._cache = models.init_cache(self._config, self.slots, self.cache_length)
    self._logits = jnp.zeros((self.slots, self._config.vocab_size))
    self._rows = [_Row() for _ in range(self.slots)]

  def start(self, slot: int, episode: int) -> None:
    """Empties a row for a new episode, whose number keys its randomness."""
    self._rows[slot] = _Row(episode=episode)
    self._cache = self._cache.replace(length=self._cache.length.at[slot].set(0))

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
      raise ValueError(f"slot {slot} has room for {self.room(slot)} tokens, asked for {len(context)} + {max_tokens}")
    row.pending = list(context)
    row.chunk += 1
    row.left, row.tokens, row.logps = max_tokens, [], []
    row.length += len(context)

  @property
  def busy(self) -> bool:
    return any(row.left for row in self._rows)

  def step(self) -> list[Reply]:
    """One round of device calls: a tile of context for the rows that have some, then a burst of sampling for the rest."""
    if any(row.pending for row in self._rows):
      self._prefill_round()
    if any(row.left and not row.pending for row in self._rows):
      return self._decode_round()
    return []

  def _prefill_round(self) -> None:
    tokens = np.zeros((self.slots, self._tile), np.int32)
    counts = np.zeros(self.slots, np.int32)
    for s, row in enumerate(self._rows):
      part, row.pending = row.pending[: self._tile], row.pending[self._tile :]
      tokens[s, : len(part)] = part
      counts[s] = len(part)
    self._cache, self._logits = _prefill(self._config, self._params, self._cache, self._logits, tokens, counts)
    self.prefilled_tokens += int(counts.sum())

  def _decode_round(self) -> list[Reply]:
    rows = self._rows
    left = np.array([0 if row.pending else row.left for row in rows], np.int32)
    field = lambda f: np.array([f(row) for row in rows], np.int32)
    self._cache, self._logits, new_left, tokens, logps = _decode(
        self._config, self._sampling, self._steps, self._params, self._cache, self._logits, self._key,
        self._stop, field(lambda r: r.episode), field(lambda r: max(r.chunk, 0)),
        field(lambda r: len(r.tokens)), left)
    new_left, tokens, logps = np.asarray(new_left), np.asarray(tokens), np.asarray(logps)
    replies = []
    for s, row in enumerate(rows):
      if not left[s]:
        continue
      n = int((tokens[s] >= 0).sum())
      row.tokens += tokens[s, :n].tolist()
      row.logps += logps[s, :n].tolist()
      row.length += n
      row.left = int(new_left[s])
      self.sampled_tokens += n
      if not row.left:
        replies.append(Reply(s, row.tokens, row.logps))
    return replies
