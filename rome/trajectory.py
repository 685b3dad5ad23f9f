"""The one record that crosses the rings: a finished episode as token ids with provenance.

Token ids are the record and text is a view of them: `tokens` are exactly what the engine consumed
and produced, nothing here is ever tokenised again. `call_ids` names the LLM call that sampled each
token (-1 for prompt and observation tokens), so that chunks never have to be inferred from mask
edges.

Left out: serialisation (rome.data will own it) and context edits (one trajectory is one append-only
row for now).
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Trajectory:
  """One episode of T tokens and K chunks (LLM calls).

  Attributes:
    id: "{task_id}#{sample}"; batches are sorted by it.
    task_id: the task instance, "{family}/{seed}".
    family: the task family, for metrics.
    instruction: the task's text.
    tokens: [T] int32, the whole context as the engine saw it.
    call_ids: [T] int32, k for tokens sampled by call k (0..K-1), -1 elsewhere.
    logps: [T] float32, the sampler's log-prob of each sampled token (nats); 0 elsewhere.
    versions: [K] int32, the params version that sampled each chunk.
    chunk_rewards: [K] float32, intermediate rewards; the final reward is in `reward`.
    reward: the final outcome.
    end_reason: why the episode ended: "submitted", "max_turns", "context_full" or an Invalid
      reason.
    turns: the text view, one entry a chunk.
    start: chunks of an expert that stand before the first chunk, as tokens of no call; 0 is the
      initial state.
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

  def __post_init__(self) -> None:
    t = self.tokens.shape
    if not (self.call_ids.shape == t and self.logps.shape == t):
      raise ValueError(
        f"trajectory {self.id}: tokens {t}, call_ids {self.call_ids.shape} and "
        f"logps {self.logps.shape} differ in shape"
      )
    if self.call_ids.max(initial=-1) >= self.num_chunks:
      raise ValueError(f"trajectory {self.id}: a call id reaches past its {self.num_chunks} chunks")

  @property
  def num_chunks(self) -> int:
    return len(self.versions)

  @property
  def success(self) -> bool:
    return isinstance(self.reward, Valid) and self.reward.value > 0
