"""The batch that the loss reads, and the host-side check that keeps NaN out of it."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkBatch:
  """A packed batch of trajectories: B rows of T tokens, with C chunk slots a row.

  A chunk never crosses rows. A row may hold several trajectories and a trajectory may span several
  rows. Slot c of row b is in use iff some token of that row has chunk id c; what unused slots hold
  is never read. What the log-probs hold at tokens outside every chunk is never read either.

  Attributes:
    tokens: int [B, T], token ids. For the model, not the loss.
    segment_ids: int [B, T], which sequence of the row a token belongs to, 0 = padding. For the
      model.
    positions: int [B, T], position within that sequence. For the model.
    chunk_ids: int [B, T], -1 outside chunks, else the slot in 0..C-1.
    old_logp: float [B, T], log-prob of each token under pi_old, or None when the batch is
      on-policy: pi_old is then the stop-gradient of the log-probs that the loss is given, and every
      ratio is exactly 1.
    behavior_logp: float [B, T], log-prob under mu, as the engine sampled the token. A missing one
      is NaN, never 0 (0 says certainty); chunks with `il_mask` need none.
    returns: float [B, C], G_c, already discounted and shaped (see `shaped_returns`).
    positive: bool [B, C], whether the chunk's trajectory is positive (in T+ of Eq. 9).
    il_mask: bool [B, C], True = the chunk is imitated (Eq. 10's first term), False = it is
      reinforced.
    trajectory_ids: int [B, C], which trajectory a chunk belongs to: 0..N-1, dense over the whole
      batch (micro-batches keep the ids of the batch that they were cut from).
    group_ids: int [B, C], which group of samples of one task; for statistics, not read by
      `ipa_loss`.
    versions: int [B, C], the policy version that sampled the chunk; not read by `ipa_loss`.
    ref_logp: float [B, T], log-prob under the reference policy of the KL penalty, or None where
      there is none.
  """

  tokens: chex.Array
  segment_ids: chex.Array
  positions: chex.Array
  chunk_ids: chex.Array
  old_logp: chex.Array | None
  behavior_logp: chex.Array
  returns: chex.Array
  positive: chex.Array
  il_mask: chex.Array
  trajectory_ids: chex.Array
  group_ids: chex.Array
  versions: chex.Array
  ref_logp: chex.Array | None = None


_TOKEN_FIELDS = ("tokens", "segment_ids", "positions", "old_logp", "behavior_logp", "ref_logp")
_CHUNK_FIELDS = ("positive", "il_mask", "trajectory_ids", "group_ids", "versions")


def validate(batch: ChunkBatch) -> None:
  """Checks a batch on the host, before it goes to the device.

  Raises:
    ValueError: naming the row and the field, for a wrong shape, a chunk id outside -1..C-1, a
      trajectory id outside 0..B*C-1, a return that is not finite, or a token of a chunk whose
      log-prob is NaN or infinite; the engine's log-prob is asked only of chunks that are
      reinforced.
  """
  fields: dict[str, Any] = {
    f.name: None if getattr(batch, f.name) is None else np.asarray(getattr(batch, f.name))
    for f in dataclasses.fields(batch)
  }
  chunk_ids, returns = fields["chunk_ids"], fields["returns"]
  _check_shapes(fields, chunk_ids, returns)
  num_slots = returns.shape[1]
  _fail_where(
    (chunk_ids < -1) | (chunk_ids >= num_slots), "chunk_ids", f"is outside -1..{num_slots - 1}"
  )

  inside = chunk_ids >= 0
  rows = np.broadcast_to(np.arange(len(chunk_ids))[:, None], chunk_ids.shape)
  in_use = np.zeros(returns.shape, bool)
  in_use[rows[inside], chunk_ids[inside]] = True
  imitated = np.zeros(chunk_ids.shape, bool)
  imitated[inside] = fields["il_mask"].astype(bool)[rows[inside], chunk_ids[inside]]

  ids = fields["trajectory_ids"]
  outside = (ids < 0) | (ids >= ids.size)
  _fail_where(in_use & outside, "trajectory_ids", f"is outside 0..{ids.size - 1}", "chunk")
  _fail_where(in_use & ~np.isfinite(returns), "returns", "is not finite", "chunk")
  _fail_where(
    inside & ~imitated & ~np.isfinite(fields["behavior_logp"]),
    "behavior_logp",
    "is not finite: the engine gave no log-prob for a sampled token",
  )
  for name in ("old_logp", "ref_logp"):
    if fields[name] is not None:
      _fail_where(inside & ~imitated & ~np.isfinite(fields[name]), name, "is not finite")


def _check_shapes(fields: dict[str, Any], chunk_ids: np.ndarray, returns: np.ndarray) -> None:
  if chunk_ids.ndim != 2:
    raise ValueError(f"ChunkBatch.chunk_ids must have shape [B, T], got {chunk_ids.shape}")
  if returns.ndim != 2 or len(returns) != len(chunk_ids) or returns.shape[1] < 1:
    raise ValueError(
      f"ChunkBatch.returns must have shape [B, C] with B = {len(chunk_ids)} and C >= 1, "
      f"got {returns.shape}"
    )
  for names, like in ((_TOKEN_FIELDS, chunk_ids), (_CHUNK_FIELDS, returns)):
    for name in names:
      value = fields[name]
      if value is not None and value.shape != like.shape:
        raise ValueError(f"ChunkBatch.{name} must have shape {like.shape}, got {value.shape}")


def _fail_where(bad: np.ndarray, name: str, what: str, column: str = "token") -> None:
  if bad.any():
    row, index = np.argwhere(bad)[0]
    raise ValueError(f"ChunkBatch.{name}: row {row}, {column} {index} {what}")
