"""A trajectory refuses provenance that does not fit its tokens."""

import dataclasses

import numpy as np
import pytest

from rome.trajectory import Invalid, Trajectory, Turn, Valid

GOOD = Trajectory(
  id="count/1#0", task_id="count/1", family="count", instruction="Count.",
  tokens=np.arange(4, dtype=np.int32), call_ids=np.array([-1, 0, -1, 1], np.int32),
  logps=np.array([0, -1, 0, -2], np.float32), versions=np.zeros(2, np.int32),
  chunk_rewards=np.zeros(2, np.float32), reward=Valid(1.0), end_reason="submitted",
  turns=(Turn("a", "b", 0),) * 2,
)  # fmt: skip


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"call_ids": np.zeros(3, np.int32)}, "count/1#0: tokens .* call_ids .* differ in shape"),
    ({"logps": np.zeros(5, np.float32)}, "count/1#0: tokens .* logps .* differ in shape"),
    ({"versions": np.zeros(1, np.int32)}, "count/1#0: a call id reaches past its 1 chunks"),
    ({"row_starts": ()}, "count/1#0: row_starts .* do not ascend from 0 below its 4 tokens"),
    ({"row_starts": (1,)}, "count/1#0: row_starts .* do not ascend from 0"),
    ({"row_starts": (0, 0)}, "count/1#0: row_starts .* do not ascend from 0"),
    ({"row_starts": (0, 3, 2)}, "count/1#0: row_starts .* do not ascend from 0"),
    ({"row_starts": (0, 4)}, "count/1#0: row_starts .* do not ascend from 0 below its 4 tokens"),
    (
      {"row_starts": (0, 2), "call_ids": np.array([-1, 0, 0, 1], np.int32)},
      "count/1#0: the row at token 2 has a call of an earlier row",
    ),
    (
      {"row_starts": (0, 2), "call_ids": np.array([-1, 1, -1, 0], np.int32)},
      "count/1#0: the row at token 2 has a call of an earlier row",
    ),
  ],
)
def test_provenance_that_does_not_fit(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(GOOD, **change)


def test_rows_hold_every_token_and_every_chunk():
  assert GOOD.rows == ((slice(0, 4), slice(0, 2)),)
  two = dataclasses.replace(GOOD, row_starts=(0, 2))
  assert two.rows == ((slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2)))
  # A row without a reply, and a chunk whose tokens are not to be imitated.
  call_ids = np.array([-1, 0, -1, -1], np.int32)
  part = dataclasses.replace(GOOD, row_starts=(0, 2, 3), call_ids=call_ids)
  assert [row.chunks for row in part.rows] == [slice(0, 1), slice(1, 1), slice(1, 2)]
  # An episode that did not begin.
  nothing = {name: getattr(GOOD, name)[:0] for name in ("tokens", "call_ids", "logps")}
  assert dataclasses.replace(GOOD, **nothing).rows == ((slice(0, 0), slice(0, 2)),)


def test_success_is_a_valid_positive_reward():
  rewards = (Valid(1.0), Valid(0.0), Valid(-1.0), Invalid("sandbox lost"))
  assert [dataclasses.replace(GOOD, reward=r).success for r in rewards] == [True] + [False] * 3
  assert GOOD.num_chunks == 2
