"""Environments that answer, hang, close late: no sandboxes, and events instead of sleeps."""

import concurrent.futures as cf
import dataclasses
import threading

import pytest

from rome.envs import SandboxError
from rome.rollout.groups import Member
from rome.rollout.lanes import Environments, Lane, Patience, Silent, Threads, TooManyAbandoned

SOON = Patience(reset=0.05, step=0.05, close=0.05, grace=0.05, max_abandoned=1)
LATE = Patience(reset=60.0, step=60.0, close=60.0, grace=60.0)
LIMIT = 30.0


class Box:
  """A sandbox whose end wakes what hangs in it."""

  def __init__(self):
    self.closed = threading.Event()

  def close(self):
    self.closed.set()


class Env:
  """Just enough of an environment; `closes` counts how often it was closed."""

  def __init__(self):
    self.sandbox, self.closes, self.closed = Box(), 0, threading.Event()
    self.unwrapped = self

  def close(self):
    self.closes += 1
    self.closed.set()


@dataclasses.dataclass
class FakeAgent:
  env: Env


def make_lane():
  lane = Lane(episode=None)
  lane.agent = FakeAgent(Env())
  return lane, lane.agent.env


def wait_for_all(environments):
  assert not cf.wait(list(environments._left), timeout=LIMIT).not_done


def first(environments):
  """What comes next, however long it takes."""
  while not (answers := environments.ready(LIMIT)):
    pass
  return answers


def test_answers_come_with_their_lane():
  environments = Environments(LATE)
  lanes = [make_lane()[0] for _ in range(3)]
  for i, lane in enumerate(lanes):
    environments.call(lane, "step", lambda i=i: i)
  answers = {}
  while len(answers) < 3:
    answers |= {lane: answer.result() for lane, answer in first(environments)}
  assert answers == {lane: i for i, lane in enumerate(lanes)}
  assert all(lane.call is None for lane in lanes) and environments.ready(0.0) == []


def test_an_error_is_the_readers():
  environments = Environments(LATE)
  environments.call(make_lane()[0], "step", lambda: 1 // 0)
  ((_, answer),) = first(environments)
  with pytest.raises(ZeroDivisionError):
    answer.result()


@pytest.mark.parametrize("kind", ["reset", "step"])
def test_a_silent_call_is_named_and_its_sandbox_killed(kind):
  environments = Environments(dataclasses.replace(LATE, **{kind: 0.05}))
  lane, env = make_lane()
  environments.call(lane, kind, env.sandbox.closed.wait, LIMIT)
  assert first(environments) == [(lane, Silent(kind, 0.05))]
  assert env.closed.wait(LIMIT) and env.sandbox.closed.is_set()
  wait_for_all(environments)
  assert environments.ready(0.0) == [] and env.closes == 1
  environments.let_go(lane)  # again, which does nothing
  assert not environments._left


def test_an_answer_that_lies_there_is_not_late():
  environments = Environments(SOON)
  lane, _ = make_lane()
  environments.call(lane, "step", lambda: "here")
  lane.call.result(LIMIT)
  environments._busy[lane.call] = (lane, "step", 0.0)  # submitted long ago
  ((_, answer),) = environments.ready(0.0)
  assert answer.result() == "here"


def test_a_cancelled_call_that_ends_in_time_keeps_its_sandbox():
  environments, release = Environments(LATE), threading.Event()
  lane, env = make_lane()
  environments.call(lane, "step", release.wait, LIMIT)
  environments.let_go(lane)
  assert environments.ready(0.0) == [] and not env.closed.is_set()
  release.set()
  assert env.closed.wait(LIMIT) and not env.sandbox.closed.is_set()


def test_a_cancelled_call_that_does_not_end_loses_its_sandbox():
  environments = Environments(dataclasses.replace(LATE, grace=0.05))
  lane, env = make_lane()
  environments.call(lane, "step", env.sandbox.closed.wait, LIMIT)
  environments.let_go(lane)
  assert env.closed.wait(LIMIT) and env.sandbox.closed.is_set()


def test_what_a_thread_takes_after_all_is_given_back():
  """A call that not even the end of the sandbox wakes: closed without it, and again behind it."""
  environments, release = Environments(SOON), threading.Event()
  lane, env = make_lane()
  environments.call(lane, "reset", release.wait, LIMIT)
  assert first(environments) == [(lane, Silent("reset", 0.05))]
  call = next(future for future in environments._left if future not in environments._closing)
  assert env.closed.wait(LIMIT) and not call.done()
  env.closed.clear()
  release.set()
  assert env.closed.wait(LIMIT) and env.closes == 2


def test_too_many_that_hang_end_the_run_and_those_that_come_back_do_not():
  environments = Environments(dataclasses.replace(SOON, close=LIMIT))
  release, silent = threading.Event(), 0
  with pytest.raises(TooManyAbandoned, match="2 threads hang .*sandbox.max_abandoned=1 allows"):
    for _ in range(3):
      environments.call(make_lane()[0], "step", release.wait, LIMIT)
      silent += len(first(environments))
  assert silent == 2
  release.set()
  wait_for_all(environments)
  ((_, answer),) = first(environments)
  assert answer.result()


def test_an_error_of_closing_is_raised_unless_the_sandbox_is_to_blame():
  environments = Environments(LATE)
  for error in (SandboxError("gone"), KeyError("a bug")):
    lane, env = make_lane()
    env.close = lambda error=error: (_ for _ in ()).throw(error)
    environments.let_go(lane)
    wait_for_all(environments)
    if isinstance(error, KeyError):
      with pytest.raises(KeyError, match="a bug"):
        environments.ready(0.0)
    else:
      assert environments.ready(0.0) == []


def test_threads_serve_again_and_never_wait_for_each_other():
  threads, release = Threads(), threading.Event()
  names = set()
  for _ in range(20):
    names.add(threads.submit(threading.get_ident).result(LIMIT))
  stuck = [threads.submit(release.wait, LIMIT) for _ in range(5)]
  assert threads.submit(lambda: "free").result(LIMIT) == "free"
  release.set()
  assert all(future.result(LIMIT) for future in stuck)
  assert len(names) < 20


def test_back_off_by_hand():
  patience = Patience(first_delay=0.5, longest_delay=8.0)
  delays = [patience.delay(Member(3, 1), n) for n in range(1, 9)]
  for delay, longest in zip(delays, [0.5, 1, 2, 4, 8, 8, 8, 8], strict=True):
    assert longest / 2 <= delay <= longest
  assert delays == [patience.delay(Member(3, 1), n) for n in range(1, 9)]
  assert len(set(delays[4:])) == 4 and patience.delay(Member(3, 2), 1) != delays[0]
  assert patience.delay(Member(3, 1), 10**6) <= 8.0
