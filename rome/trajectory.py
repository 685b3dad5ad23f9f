"""The one record that crosses the rings: a finished episode as token ids with provenance.

Token ids are the record and text is a view of them: `tokens` are exactly what the engine consumed
and produced, nothing here is ever tokenised again. `call_ids` names the LLM call that sampled each
token (-1 for prompt and observation tokens), so that chunks never have to be inferred from mask
edges.

A context grows by appending. An agent that rewrites its context (it compacts, forgets, or calls a
sub-agent) begins a new *row*: another sequence from its first token on, of the same episode. Tokens
that were sampled in one row and stand in the context of a later one are tokens of no call there, so
that each is trained on once.

Left out: serialisation (rome.data will own it).
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Valid:
  """A reward that the environment measured."""

  value: float


@dataclasses.dataclass(frozen=True)
class Invalid:
  """No reward: the infrastructure failed, for the stated reason. Never counted as a zero."""

  reason: str


Reward = Valid | Invalid


@dataclasses.dataclass(frozen=True)
class Turn:
  """The text view of one chunk: what the policy wrote and what came back."""

  action: str
  observation: str
  exit_code: int | None


class Row(NamedTuple):
  """What one row has of its trajectory: its tokens, and its chunks."""

  tokens: slice
  chunks: slice


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """One episode of T tokens and K chunks (LLM calls), in one row or several.

  Attributes:
    id: "{task_id}#{sample}"; batches are sorted by it.
    task_id: the task instance, "{family}/{seed}".
    family: the task family, for metrics.
    instruction: the task's text.
    tokens: [T] int32, the contexts of all rows, end to end, as the engine saw them.
    call_ids: [T] int32, k for tokens sampled by call k (0..K-1), -1 elsewhere; calls are numbered
      through all rows, in the order in which they were made.
    logps: [T] float32, the sampler's log-prob of each sampled token (nats); 0 elsewhere.
    versions: [K] int32, the params version that sampled each chunk.
    chunk_rewards: [K] float32, intermediate rewards; the final reward is in `reward`.
    reward: the final outcome.
    end_reason: why the episode ended: "submitted", "max_turns", "context_full" or an Invalid
      reason.
    turns: the text view, one entry a chunk.
    start: chunks of an expert that stand before the first chunk, as tokens of no call; 0 is the
      initial state.
    row_starts: where rows begin in `tokens`, ascending from 0. No chunk lies in two rows.
  """

  id: str
  task_id: str
  family: str
  instruction: str
  tokens: np.ndarray
  call_ids: np.ndarray
  logps: np.ndarray
  versions: np.ndarray
  chunk_rewards: np.ndarray
  reward: Reward
  end_reason: str
  turns: tuple[Turn, ...]
  start: int = 0
  row_starts: tuple[int, ...] = (0,)

  def __post_init__(self) -> None:
    t = self.tokens.shape
    if not (self.call_ids.shape == t and self.logps.shape == t):
      raise ValueError(
        f"trajectory {self.id}: tokens {t}, call_ids {self.call_ids.shape} and "
        f"logps {self.logps.shape} differ in shape"
      )
    if self.call_ids.max(initial=-1) >= self.num_chunks:
      raise ValueError(f"trajectory {self.id}: a call id reaches past its {self.num_chunks} chunks")
    starts = self.row_starts
    if starts == (0,):
      return
    ends = (*starts[1:], len(self.tokens))
    if starts[:1] != (0,) or any(a >= b for a, b in zip(starts, ends, strict=True)):
      raise ValueError(
        f"trajectory {self.id}: row_starts {starts} do not ascend from 0 below its "
        f"{len(self.tokens)} tokens"
      )
    latest = np.maximum.accumulate(self.call_ids)
    for start in starts[1:]:
      later = self.call_ids[start:]
      if (later[later >= 0] <= latest[start - 1]).any():
        raise ValueError(
          f"trajectory {self.id}: the row at token {start} has a call of an earlier row"
        )

  @property
  def num_chunks(self) -> int:
    return len(self.versions)

  @property
  def rows(self) -> tuple[Row, ...]:
    """The rows, in order: every token and every chunk is in one of them."""
    ends = (*self.row_starts[1:], len(self.tokens))
    tokens = [slice(start, end) for start, end in zip(self.row_starts, ends, strict=True)]
    # A chunk without tokens, of an expert that is imitated in part, counts to the row behind it.
    bounds = [int(self.call_ids[: at.stop].max(initial=-1)) + 1 for at in tokens[:-1]]
    chunks = itertools.starmap(slice, itertools.pairwise((0, *bounds, self.num_chunks)))
    return tuple(map(Row, tokens, chunks))

  @property
  def success(self) -> bool:
    return isinstance(self.reward, Valid) and self.reward.value > 0
