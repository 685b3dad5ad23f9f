"""The timeline: what Perfetto loads, bounded, whole after a kill, and cheap."""

import json
import threading
import time

import pytest

from rome.rollout import NO_TIMELINE, Timeline, read_marks
from rome.rollout.timeline import ENGINE, LANES, TRAINER


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def events(path, complete=True):
  """The array as a reader that allows for a missing bracket has it."""
  text = path.read_text()
  return json.loads(text if complete else text + "]")


def spans(path, complete=True):
  return [e for e in events(path, complete) if e["ph"] == "X"]


def an_update(timeline, clock, step):
  """10 s: trainer 4, engine 5, lanes 2 and 1 of 2 lanes."""
  start = clock.now
  timeline.span(ENGINE, "step", start, start + 5)
  timeline.span(ENGINE, "waiting", start + 5, start + 6)
  timeline.count("rows", running=3, waiting=1)
  timeline.span(LANES, "reset", start, start + 2, 'count/1#1 "x"')
  timeline.span(LANES + 1, "tests", start + 2, start + 3)
  timeline.span(LANES + 1, "waiting", start + 3, start + 9)
  timeline.span(TRAINER, "pack", start + 6, start + 7)
  timeline.span(TRAINER, "update", start + 7, start + 10)
  clock.now += 10
  timeline.mark("rl", step)


def test_tracks_spans_counters_and_marks(tmp_path):
  clock, path = Clock(), tmp_path / "timeline.json"
  timeline = Timeline(path, 2, clock=clock)
  an_update(timeline, clock, 1)
  with timeline.stage("checkpoint"):
    clock.now += 0.5
  timeline.close()
  timeline.close()
  found = events(path)
  names = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
  assert names == {0: "trainer", 1: "engine", 2: "environment 0", 3: "environment 1"}
  (reset,) = [e for e in found if e["name"] == "reset"]
  assert (reset["ts"], reset["dur"], reset["tid"]) == (0, 2_000_000, LANES)
  assert reset["args"] == {"about": 'count/1#1 "x"'}
  (rows,) = [e for e in found if e["ph"] == "C"]
  assert rows["args"] == {"running": 3, "waiting": 1}
  assert found[-1]["name"] == "checkpoint" and found[-1]["dur"] == 500_000
  assert read_marks(path) == [{
    "phase": "rl", "step": 1, "seconds": 10.0,
    "idle_trainer": 0.6, "idle_engine": 0.5, "idle_environments": 0.85,
  }]  # fmt: skip


@pytest.mark.parametrize("cut", [0, 1, 20, 70])
def test_a_killed_writer_leaves_what_can_be_read_and_gone_on_with(tmp_path, cut):
  clock, path = Clock(), tmp_path / "timeline.json"
  timeline = Timeline(path, 2, clock=clock)
  for step in (1, 2):
    an_update(timeline, clock, step)
  assert len(spans(path, complete=False)) == 14
  if cut:  # a torn last line
    path.write_bytes(path.read_bytes()[:-cut])
  clock.now = 5.0  # another process has another clock
  again = Timeline(path, 2, clock=clock)
  an_update(again, clock, 3)
  again.close()
  assert [mark["step"] for mark in read_marks(path)] == ([1, 2, 3] if not cut else [1, 3])
  starts = [e["ts"] for e in events(path) if e["name"] == "pack"]
  assert starts == [6_000_000, 16_000_000, 26_000_000]
  Timeline(path, 2, clock=clock).close()  # after a clean end too
  assert len(spans(path)) == 21


def test_what_is_no_timeline_is_replaced(tmp_path):
  path = tmp_path / "timeline.json"
  path.write_text("something else\n")
  Timeline(path, 1).close()
  assert len(events(path)) == 7


def test_it_stays_bounded_and_keeps_the_newest(tmp_path):
  clock, path = Clock(), tmp_path / "timeline.json"
  timeline = Timeline(path, 2, max_bytes=20_000, clock=clock)
  for step in range(1, 101):
    an_update(timeline, clock, step)
    assert path.stat().st_size <= 20_000
  timeline.close()
  steps = [mark["step"] for mark in read_marks(path)]
  assert steps == list(range(steps[0], 101)) and 5 < len(steps) < 50
  assert len(spans(path)) == 7 * len(steps)
  assert [e["name"] for e in events(path)].count("thread_name") == 4
  assert list(tmp_path.iterdir()) == [path]


def test_threads_lose_nothing(tmp_path):
  path = tmp_path / "timeline.json"
  timeline = Timeline(path, 8)

  def work(lane):
    for _ in range(2000):
      timeline.span(LANES + lane, "step", 0, 1)

  threads = [threading.Thread(target=work, args=(lane,)) for lane in range(8)]
  for thread in threads:
    thread.start()
  while any(thread.is_alive() for thread in threads):
    timeline.mark("rl", 1)
  for thread in threads:
    thread.join()
  timeline.close()
  assert len(spans(path)) == 16_000


def test_none_records_nothing():
  NO_TIMELINE.span(TRAINER, "update", 0, 1)
  NO_TIMELINE.mark("rl", 1)
  with NO_TIMELINE.stage("pack"):
    pass
  NO_TIMELINE.close()
  assert not NO_TIMELINE._events


def test_it_costs_microseconds(tmp_path):
  """A generous bound: an update of a thousand events takes seconds, its timeline milliseconds."""
  timeline = Timeline(tmp_path / "timeline.json", 32)
  started = time.process_time()
  for n in range(10_000):
    timeline.span(LANES + n % 32, "step", 0.0, 1.0, "count/1#1")
  timeline.mark("rl", 1)
  assert (time.process_time() - started) / 10_000 < 1e-4
