"""Packs finished trajectories into the rows of a `ChunkBatch`.

A row of the batch may hold several rows of trajectories, each a sequence of its own. Two ways are
tried and the one with fewer rows is taken: the largest first, each into the fullest row that has
room (best fit decreasing); and row after row, the largest that is left with those of the others
that leave the least room beside it (a subset sum; minimum bin slack, Gupta and Ho 1999). Both
follow from the trajectories' order and sizes, so the same ones always give the same arrays. Exact
numerics want each in a row of its own.

Rows of one trajectory lie in one micro-batch, as estimators with a ratio a trajectory need (their
sums by trajectory id run over the rows of all its shards). Trajectories of several rows are placed
first, the largest first, each into the first micro-batch that has room for all of it; the others
fill what is left.

Every micro-batch has `rows_multiple` rows of `row_length` tokens: that is the budget of tokens of a
device call, and the one shape that is compiled. Rows are rounded up to whole micro-batches, so only
the last one has rows of padding, but for those that trajectories of several rows leave over; and
none has nothing else unless there is nothing to train on. Left out: rows of several lengths, which
are as many programs to compile, and sequences cut over rows, whose later parts would have to attend
to other rows.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt

from rome import ipa
from rome.trajectory import Row, Trajectory, Valid


def pack(
  trajectories: Sequence[Trajectory],
  ipa_config: ipa.IPAConfig,
  step: int,
  *,
  row_length: int,
  max_chunks: int,
  rows_multiple: int,
  pad: int,
  experts: Sequence[Trajectory] = (),
  share_rows: bool = True,
) -> ipa.ChunkBatch:
  """The batch that one update trains on.

  Args:
    trajectories: finished episodes with a valid reward, to reinforce; their order fixes their
      trajectory ids.
    ipa_config: how rewards become returns.
    step: the update that the batch is for.
    row_length: T, tokens a row.
    max_chunks: C, chunk slots a row.
    rows_multiple: the number of rows is a multiple of this.
    pad: token id of padding.
    experts: trajectories to imitate, packed behind the others; they need no sampler log-probs.
    share_rows: whether a row may hold several sequences.
  Returns:
    A `ChunkBatch` of numpy arrays, `old_logp` None.
  Raises:
    ValueError: a row of a trajectory does not fit into one of the batch, or all its rows not into a
      micro-batch; or it has no valid reward.
  """
  reinforced = len(trajectories)
  trajectories = [*trajectories, *experts]
  places, num_rows = _places(trajectories, row_length, max_chunks, rows_multiple, share_rows)
  rows = -(-max(num_rows, 1) // rows_multiple) * rows_multiple

  def token(fill: float, dtype: npt.DTypeLike) -> np.ndarray:
    return np.full((rows, row_length), fill, dtype)

  def chunk(fill: float, dtype: npt.DTypeLike) -> np.ndarray:
    return np.full((rows, max_chunks), fill, dtype)

  batch = ipa.ChunkBatch(
    tokens=token(pad, np.int32),
    segment_ids=token(0, np.int32),
    positions=token(0, np.int32),
    chunk_ids=token(-1, np.int32),
    old_logp=None,
    behavior_logp=token(0, np.float32),
    returns=chunk(0, np.float32),
    positive=chunk(False, bool),
    il_mask=chunk(False, bool),
    trajectory_ids=chunk(0, np.int32),
    group_ids=chunk(0, np.int32),
    versions=chunk(0, np.int32),
  )
  # Samples of one state: where members of a task start apart, each start is a group.
  groups = {of: i for i, of in enumerate(sorted({(t.task_id, t.start) for t in trajectories}))}
  group_ids = np.array([groups[t.task_id, t.start] for t in trajectories], np.int32)
  # Apart, so that experts are in no baseline and get none.
  parts = [
    _returns(trajectories[:reinforced], group_ids[:reinforced], ipa_config, step, max_chunks),
    _returns(
      trajectories[reinforced:], group_ids[reinforced:], _of_experts(ipa_config), step, max_chunks
    ),
  ]
  returns = [row for part in parts for row in part[0]]
  positive = [sign for part in parts for sign in part[1]]
  of_rows = ((n, t, own) for n, t in enumerate(trajectories) for own in t.rows)
  for (n, trajectory, own), (row, first, slot, segment) in zip(of_rows, places, strict=True):
    length, chunks = _size(own)
    at = (row, slice(first, first + length))
    batch.tokens[at] = trajectory.tokens[own.tokens]
    batch.segment_ids[at] = segment
    batch.positions[at] = np.arange(length)
    batch.behavior_logp[at] = trajectory.logps[own.tokens]
    # Segmenting an episode alone and shifting keeps call ids and chunk slots in step.
    calls = trajectory.call_ids[own.tokens]
    batch.chunk_ids[at] = np.where(calls >= 0, calls - own.chunks.start + slot, -1)
    slots = (row, slice(slot, slot + chunks))
    batch.returns[slots] = returns[n][own.chunks]
    batch.positive[slots] = positive[n]
    batch.il_mask[slots] = n >= reinforced
    batch.trajectory_ids[slots] = n
    batch.group_ids[slots] = group_ids[n]
    batch.versions[slots] = trajectory.versions[own.chunks]
  ipa.validate(batch)
  return batch


def occupancy(batch: ipa.ChunkBatch) -> float:
  """Share of the places of all rows, rows of padding included, that hold tokens."""
  return float(np.count_nonzero(batch.segment_ids) / batch.segment_ids.size)


def _size(row: Row) -> tuple[int, int]:
  """Its tokens and its chunks."""
  return row.tokens.stop - row.tokens.start, row.chunks.stop - row.chunks.start


def _places(
  trajectories: Sequence[Trajectory],
  row_length: int,
  max_chunks: int,
  rows_multiple: int,
  share_rows: bool,
) -> tuple[list[tuple[int, int, int, int]], int]:
  """Where the rows of all trajectories lie, and the number of rows of the batch.

  Returns:
    (row, first token, first chunk slot, segment id) of each, in the order of the trajectories and
    of their rows; and the number of rows.
  """
  sizes = [_size(row) for t in trajectories for row in t.rows]
  owners = [(t, r) for t in trajectories for r in range(len(t.row_starts))]
  for (trajectory, r), (tokens, chunks) in zip(owners, sizes, strict=True):
    if tokens > row_length or chunks > max_chunks:
      which = f"row {r} of " if len(trajectory.row_starts) > 1 else ""
      raise ValueError(
        f"{which}trajectory {trajectory.id} has {tokens} tokens and {chunks} chunks, a row holds "
        f"{row_length} and {max_chunks}"
      )
  # Each counts as the larger of its shares of a row, so that what fits by tokens fits by chunk
  # slots; where rows are not shared, as all of it.
  weights = [
    max(tokens, -(-chunks * row_length // max_chunks)) if share_rows else row_length
    for tokens, chunks in sizes
  ]
  rows, left = _together(trajectories, weights, row_length, rows_multiple)
  rows = min((fill(weights, left, row_length, rows) for fill in (_fill, _best_fit)), key=len)
  places = [(0, 0, 0, 0)] * len(sizes)
  for number, members in enumerate(rows):
    first, slot = 0, 0
    for segment, n in enumerate(members, start=1):
      places[n] = (number, first, slot, segment)
      first, slot = first + sizes[n][0], slot + sizes[n][1]
  return places, len(rows)


def _together(
  trajectories: Sequence[Trajectory], weights: Sequence[int], room: int, rows_multiple: int
) -> tuple[list[list[int]], list[int]]:
  """Rows, in whole micro-batches, with all of each trajectory that has several; and the others.

  Args:
    trajectories: all.
    weights: of each of their rows.
    room: what a row of the batch holds.
    rows_multiple: rows a micro-batch.
  Returns:
    Rows of indices into `weights`, and the indices that are in none of them.
  Raises:
    ValueError: a trajectory does not fit into a micro-batch.
  """
  ends = np.cumsum([len(t.row_starts) for t in trajectories]).tolist()
  parts = [range(end - len(t.row_starts), end) for t, end in zip(trajectories, ends, strict=True)]
  several = [n for n, part in enumerate(parts) if len(part) > 1]
  rows: list[list[int]] = []
  for n in sorted(several, key=lambda n: -sum(weights[i] for i in parts[n])):
    for begin in range(0, len(rows) + 1, rows_multiple):
      micro = rows[begin : begin + rows_multiple] or [[] for _ in range(rows_multiple)]
      fitted = _best_fit(weights, parts[n], room, micro)
      if len(fitted) == rows_multiple:
        rows[begin : begin + rows_multiple] = fitted
        break
    else:
      raise ValueError(
        f"trajectory {trajectories[n].id} has {len(parts[n])} rows, which a micro-batch of "
        f"{rows_multiple} rows does not hold; raise micro_rows to {len(parts[n])}"
      )
  return rows, [part[0] for part in parts if len(part) == 1]


def _decreasing(weights: Sequence[int], some: Sequence[int]) -> list[int]:
  """The indices `some`, the largest weight first; equal ones in their order."""
  return sorted(some, key=lambda n: -weights[n])


def _best_fit(
  weights: Sequence[int], some: Sequence[int], room: int, begun: Sequence[Sequence[int]]
) -> list[list[int]]:
  """Rows of indices: each of `some`, the largest first, into the fullest row that has room for it.

  Those that are begun come first.
  """
  rows = [list(row) for row in begun]
  free = [room - sum(weights[n] for n in row) for row in rows]
  for n in _decreasing(weights, some):
    _, row = min(((f, r) for r, f in enumerate(free) if f >= weights[n]), default=(0, len(rows)))
    if row == len(rows):
      rows.append([])
      free.append(room)
    rows[row].append(n)
    free[row] -= weights[n]
  return rows


def _fill(
  weights: Sequence[int], some: Sequence[int], room: int, begun: Sequence[Sequence[int]]
) -> list[list[int]]:
  """Rows of indices: those that are begun with what of `some` fills them the most, then others.

  Of these each has the largest weight that is left, and those that fill its row the most.
  """
  rows, left = [], _decreasing(weights, some)
  waiting = collections.deque(begun)
  while waiting or left:
    row = list(waiting.popleft()) if waiting else [left.pop(0)]
    free = room - sum(weights[n] for n in row)
    row += [left[i] for i in _fullest([weights[n] for n in left], free)]
    rows.append(row)
    taken = set(row)
    left = [n for n in left if n not in taken]
  return rows


def _fullest(weights: Sequence[int], room: int) -> list[int]:
  """Indices, ascending, of the weights whose sum is the largest within `room`; the first such."""
  reached = [1]  # bit s of entry i: some of the first i weights sum to s
  for weight in weights:
    if reached[-1] >> room:
      break
    reached.append((reached[-1] | reached[-1] << weight) & ((2 << room) - 1))
  total, chosen = reached[-1].bit_length() - 1, []
  for i in reversed(range(len(reached) - 1)):
    if not reached[i] >> total & 1:  # not without weight i
      chosen.append(i)
      total -= weights[i]
  return chosen[::-1]


def _of_experts(config: ipa.IPAConfig) -> ipa.IPAConfig:
  return dataclasses.replace(config, centre="none", scale="none", advantage_clip=math.inf)


def _returns(
  trajectories: Sequence[Trajectory],
  group_ids: np.ndarray,
  config: ipa.IPAConfig,
  step: int,
  max_chunks: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns [N, K] and signs [N] of every trajectory, as numpy."""
  if not trajectories:
    return np.zeros((0, 1), np.float32), np.zeros(0, bool)
  num_chunks = np.array([t.num_chunks for t in trajectories], np.int32)
  # Of few widths, so that batches with longer episodes do not retrace: one, but for trajectories of
  # several rows that have more chunks than a row.
  width = -(-int(num_chunks.max()) // max_chunks) * max_chunks
  rewards = np.zeros((len(trajectories), width), np.float32)
  for n, trajectory in enumerate(trajectories):
    if not isinstance(trajectory.reward, Valid):
      raise ValueError(f"trajectory {trajectory.id} has no valid reward: {trajectory.reward}")
    rewards[n, : trajectory.num_chunks] = trajectory.chunk_rewards
    rewards[n, trajectory.num_chunks - 1] += trajectory.reward.value
  _, groups = np.unique(group_ids, return_inverse=True)
  truncated = np.array([t.end_reason != "submitted" for t in trajectories])
  return jax.device_get(_shaped_returns(rewards, num_chunks, step, config, groups, truncated))


_shaped_returns = jax.jit(ipa.shaped_returns, static_argnums=3)
