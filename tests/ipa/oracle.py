"""Eqs. 7-10 in numpy float64, chunk by chunk, from the equations and not from `rome.ipa`.

Also the small builder that turns a list of chunks and a layout into the arrays of a batch.
"""

import dataclasses
import math

import numpy as np

from rome.ipa import ChunkBatch


@dataclasses.dataclass
class Chunk:
  """One chunk apart from where it lies: its tokens' log-probs and what its slot says."""

  logp: np.ndarray
  old: np.ndarray
  behavior: np.ndarray
  ret: float = 1.0
  positive: bool = True
  il: bool = False
  trajectory: int = 0


def chunk_of(logp, old=None, behavior=None, **slot) -> Chunk:
  """A chunk from a list of log-probs; pi_old defaults to pi_theta, and mu to pi_old."""
  logp = np.asarray(logp, np.float64)
  old = logp if old is None else np.asarray(old, np.float64)
  behavior = old if behavior is None else np.asarray(behavior, np.float64)
  return Chunk(logp, old, behavior, **slot)


def pack(chunks, layout, num_tokens, num_slots, dtype=np.float32, gap=1, garbage=0.0):
  """Lays chunks out in rows.

  Args:
    chunks: list of Chunk.
    layout: for each row, the indices of its chunks in order.
    num_tokens, num_slots: T and C.
    dtype: of the float fields.
    gap: tokens outside every chunk in front of each chunk, a number or a function of nothing.
    garbage: what tokens and slots not in use hold.

  Returns:
    (logp_BxT, batch, where): where[i] = (row, token indices) of chunk i.
  """
  shape, slots = (len(layout), num_tokens), (len(layout), num_slots)
  logp, old, behavior = (np.full(shape, garbage, dtype) for _ in range(3))
  returns = np.full(slots, garbage, dtype)
  chunk_ids = np.full(shape, -1, np.int32)
  positive, il_mask = np.zeros(slots, bool), np.zeros(slots, bool)
  trajectory_ids = np.zeros(slots, np.int32)
  where = {}
  for row, indices in enumerate(layout):
    at = 0
    for slot, i in enumerate(indices):
      at += gap() if callable(gap) else gap
      chunk = chunks[i]
      span = np.arange(at, at + len(chunk.logp))
      logp[row, span], old[row, span], behavior[row, span] = chunk.logp, chunk.old, chunk.behavior
      chunk_ids[row, span] = slot
      returns[row, slot], positive[row, slot] = chunk.ret, chunk.positive
      il_mask[row, slot], trajectory_ids[row, slot] = chunk.il, chunk.trajectory
      where[i] = (row, span)
      at += len(chunk.logp)
  zeros_BxT, zeros_BxC = np.zeros(shape, np.int32), np.zeros(slots, np.int32)
  batch = ChunkBatch(
    tokens=zeros_BxT,
    segment_ids=zeros_BxT,
    positions=zeros_BxT,
    chunk_ids=chunk_ids,
    old_logp=old,
    behavior_logp=behavior,
    returns=returns,
    positive=positive,
    il_mask=il_mask,
    trajectory_ids=trajectory_ids,
    group_ids=zeros_BxC,
    versions=zeros_BxC,
  )
  return logp, batch, where


def random_batch(seed, num_rows, num_tokens, num_slots, dtype):
  """A ragged batch: empty rows, one-token chunks, adjacent chunks, shared rows, split trajectories.

  One batch in eight has every reinforced chunk beyond a mask at 5, one in eight none at all.
  """
  rng = np.random.default_rng(seed)
  shift = rng.choice([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0, np.nan])
  chunks, layout, trajectory = [], [], 0
  for _ in range(num_rows):
    row, room = [], num_tokens
    while rng.random() > 0.2 and len(row) < num_slots and not np.isnan(shift):
      length = int(rng.choice([1, 1, 2, 3, 5]))
      if room < length + 2:
        break
      room -= length + 2
      logp = -rng.exponential(1.0, length)
      old = logp + rng.normal(0.0, 0.7, length)
      # A chunk's mismatch is wide enough for masks at 1.1 and at 0.6 to bite now and then.
      behavior = old - shift - rng.normal(0.0, 0.4)
      row.append(len(chunks))
      trajectory += int(rng.random() < 0.4 and len(chunks) > 0)
      il = bool(rng.random() < 0.25)
      chunk = Chunk(logp, old, behavior, rng.normal(), bool(rng.random() < 0.5), il, trajectory)
      chunks.append(chunk)
    layout.append(row)
  gap = lambda: int(rng.integers(0, 3))  # noqa: E731
  garbage = float(rng.choice([0.0, 1e30, -1e30, np.nan]))
  logp, batch, _ = pack(chunks, layout, num_tokens, num_slots, dtype, gap, garbage)
  if rng.random() < 0.3:  # a hole: an unsampled token inside a chunk
    token = int(rng.integers(num_tokens))
    batch.chunk_ids[:, token] = np.where(
      batch.chunk_ids[:, token] == 0, -1, batch.chunk_ids[:, token]
    )
  return logp, batch


@dataclasses.dataclass
class Expected:
  """What the loss should be, what its gradient, and how well this can be decided in floats."""

  loss: float
  grad: np.ndarray
  scale: float  # sum of the absolute terms that make the loss
  ratios: list  # pi_old/mu of every reinforced chunk
  metrics: dict


def ipa(logp_BxT, batch, config) -> Expected:
  """Eqs. 9 and 10 over a batch, chunk by chunk."""
  logp = np.asarray(logp_BxT, np.float64)
  old = logp if batch.old_logp is None else np.asarray(batch.old_logp, np.float64)
  behavior = np.asarray(batch.behavior_logp, np.float64)
  terms = {False: [], True: []}
  for row in range(len(logp)):
    for slot in range(batch.returns.shape[1]):
      span = [t for t in range(logp.shape[1]) if batch.chunk_ids[row, t] == slot]
      if span:
        terms[bool(batch.il_mask[row, slot])].append((row, slot, span))

  out = Expected(0.0, np.zeros_like(logp), 0.0, [], {})
  masked = truncated = positives = 0
  ratio_sum, mismatch = 0.0, []
  for il, members in terms.items():
    strength = config.lambda_il if il else config.lambda_rl
    by_trajectory = {}
    for row, slot, span in members:
      name = int(batch.trajectory_ids[row, slot])
      by_trajectory[name] = by_trajectory.get(name, 0) + len(span)
    for row, slot, span in members:
      g = float(batch.returns[row, slot])
      if il:
        weight = math.prod(math.exp(logp[row, t]) for t in span)
        weight = weight if config.il_weight == "policy" else 1.0
      else:
        rho = math.exp(sum(logp[row, t] - old[row, t] for t in span) / len(span))
        engine = math.exp(sum(old[row, t] - behavior[row, t] for t in span) / len(span))
        kept = config.mask_lower <= engine <= config.mask_upper
        positive = bool(batch.positive[row, slot])
        weight = (1.0 if positive else min(max(rho, 0.0), 1.0)) * kept
        masked, positives = masked + (not kept), positives + positive
        truncated += (not positive) and rho > 1
        ratio_sum += rho
        mismatch += [abs(old[row, t] - behavior[row, t]) for t in span]
        out.ratios.append(engine)
      z = {
        "token_mean": sum(by_trajectory.values()),
        "trajectory_sum": len(by_trajectory),
        "chunk_mean": len(members) * len(span),
        "trajectory_mean": len(by_trajectory) * by_trajectory[int(batch.trajectory_ids[row, slot])],
      }[config.normaliser]
      for t in span:
        coefficient = strength * weight * g / z
        out.loss -= coefficient * logp[row, t]
        out.scale += abs(coefficient * logp[row, t])
        out.grad[row, t] = -coefficient
  count = max(len(terms[False]), 1)
  out.metrics = {
    "masked_share": masked / count,
    "truncated_share": truncated / count,
    "positive_share": positives / count,
    "ratio_mean": ratio_sum / count,
    "mismatch_mean": sum(mismatch) / max(len(mismatch), 1),
    "mismatch_max": max(mismatch, default=0.0),
    "chunks": len(terms[False]),
    "tokens": sum(len(span) for _, _, span in terms[False]),
    "il_tokens": sum(len(span) for _, _, span in terms[True]),
  }
  return out


def returns(rewards, gamma):
  """Eq. 7 for one trajectory, as the double sum it is."""
  return [
    sum(gamma ** (j - k) * rewards[j] for j in range(k, len(rewards))) for k in range(len(rewards))
  ]
