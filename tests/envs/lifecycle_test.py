"""The life cycle: legal and illegal moves, idempotence, history."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rome.envs import lifecycle
from rome.envs.lifecycle import IllegalTransition, Lifecycle

STATES = ("pending", "running", "stopped", "deleted", "failed")
LEGAL = {
  ("pending", "running"),
  ("pending", "stopped"),
  ("pending", "failed"),
  ("running", "stopped"),
  ("running", "failed"),
  ("stopped", "deleted"),
  ("failed", "deleted"),
}
WAY = {
  "pending": [],
  "running": ["running"],
  "stopped": ["running", "stopped"],
  "failed": ["failed"],
  "deleted": ["running", "stopped", "deleted"],
}


def in_state(state):
  life = Lifecycle(0.0)
  for step in WAY[state]:
    life.move(step, 1.0, "test")
  return life


@pytest.mark.parametrize(("source", "target"), list(itertools.product(STATES, STATES)))
def test_every_move(source, target):
  life = in_state(source)
  before = list(life.history)
  if (source, target) in LEGAL:
    life.move(target, 2.0, "why")
    assert life.history == [*before, (2.0, target, "why")] and life.state == target
  else:
    with pytest.raises(IllegalTransition, match=f"is {source} cannot become {target}"):
      life.move(target, 2.0, "why")
    assert life.history == before


@pytest.mark.parametrize("state", STATES)
def test_stop_and_delete_are_idempotent(state):
  life = in_state(state)
  assert life.stop(5.0, "a") is (state in ("pending", "running"))
  stopped = list(life.history)
  assert not life.stop(6.0, "b") and life.history == stopped
  assert life.delete(7.0, "c") is (state != "deleted")
  deleted = list(life.history)
  assert not life.delete(8.0, "d") and not life.stop(8.0, "d") and life.history == deleted
  assert life.state == "deleted" and life.finished


@given(st.lists(st.sampled_from(["stop", "delete", *STATES])))
def test_history_is_always_a_legal_path(actions):
  life = Lifecycle(0.0)
  for time, action in enumerate(actions, 1):
    if action in ("stop", "delete"):
      getattr(life, action)(float(time), "by hand")
    else:
      try:
        life.move(action, float(time), "by hand")
      except IllegalTransition:
        pass
  states = [event.state for event in life.history]
  assert states[0] == "pending"
  assert all(pair in LEGAL for pair in itertools.pairwise(states))
  times = [event.time for event in life.history]
  assert times == sorted(times)
  assert set(lifecycle.MOVES) == set(STATES)
