"""Shares of what replies called, by hand."""

import numpy as np

from rome.rollout import tool_use
from rome.text import ByteTokenizer
from rome.trajectory import Trajectory, Turn, Valid

T = ByteTokenizer()


def episode(*replies):
  """A trajectory of (call text, exit code) pairs; a text of None is a reply that is cut off."""
  tokens, call_ids, turns = [], [], []
  for k, (text, code) in enumerate(replies):
    said = [65] if text is None else [T.call, *T.encode(text), T.end]
    tokens += [66, *said]
    call_ids += [-1, *[k] * len(said)]
    turns.append(Turn(str(text), "", code))
  return Trajectory(
    id="t#0",
    task_id="t",
    family="f",
    instruction="",
    tokens=np.array(tokens, np.int32),
    call_ids=np.array(call_ids, np.int32),
    logps=np.zeros(len(tokens), np.float32),
    versions=np.zeros(len(replies), np.int32),
    chunk_rewards=np.zeros(len(replies), np.float32),
    reward=Valid(0.0),
    end_reason="submitted",
    turns=tuple(turns),
  )


def test_by_hand():
  played = [
    episode(("sh ls", 0), ("sh false", 1), ("submit", None)),
    episode((None, None), ("sh sleep 9", None), ("sh", None), ("sh ls", 0), ("sh ls", 0)),
  ]
  assert tool_use(played, T) == {
    "calls_sh": 5 / 8, "calls_submit": 1 / 8, "calls_malformed": 2 / 8, "sh_ok": 3 / 5,
  }  # fmt: skip


def test_nothing_to_count():
  assert set(tool_use([], T).values()) == {None}
  assert tool_use([episode()], T)["sh_ok"] is None
  assert tool_use([episode((None, None))], T)["sh_ok"] is None
