"""Fairness, aging, deadlines and cancellation of the queue; time is a number here."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rome.envs.admission import Capacity, Ledger, dominant_share
from rome.envs.queueing import FairQueue, QueueFull, QueueTimeout, Ticket, timeout_error

TOTAL = Capacity(100.0, 100, 100, 100)


def ticket(key, tenant="t", size=1, since=0.0, deadline=1e9):
  amount = Capacity(float(size), size, size, size)
  return Ticket(key, tenant, amount, dominant_share(amount, TOTAL), since, deadline)


def fill(queue, *tickets):
  for one in tickets:
    queue.put(one)
  return list(tickets)


def drain(queue, fits=lambda t: True, now=0.0):
  order = []
  while (one := queue.pop(now, fits)) is not None:
    order.append(one.key)
  return order


def test_one_tenant_is_first_come_first_served():
  queue = FairQueue()
  fill(queue, *[ticket(str(i), size=1 + i % 7) for i in range(20)])
  assert drain(queue) == [str(i) for i in range(20)] and len(queue) == 0


def test_a_thousand_waiting_do_not_starve_one():
  queue = FairQueue()
  fill(queue, *[ticket(f"a{i}", "a") for i in range(1000)])
  for _ in range(10):
    queue.pop(0.0, lambda t: True)
  queue.put(ticket("b", "b"))
  assert "b" in [queue.pop(0.0, lambda t: True).key for _ in range(2)]
  assert queue.waiting() == {"a": 989}


def test_tenants_share_by_cost_not_by_count():
  queue = FairQueue()
  fill(queue, *[ticket(f"a{i}", "a", 1) for i in range(400)])
  fill(queue, *[ticket(f"b{i}", "b", 10) for i in range(40)])
  served = [queue.pop(0.0, lambda t: True) for _ in range(110)]
  costs = {name: sum(t.needs.memory_mb for t in served if t.tenant == name) for name in "ab"}
  assert abs(costs["a"] - costs["b"]) <= 10 and len(served) == 110


def test_newcomers_do_not_starve_who_waits():
  """An endless stream of new tenants, each with something cheaper."""
  queue = FairQueue()
  queue.put(ticket("old", "old", 50))
  for i in range(60):
    queue.put(ticket(f"new{i}", f"new{i}", 1))
    if queue.pop(0.0, lambda t: True).key == "old":
      break
  assert i <= 50


def test_small_ones_pass_a_big_one_until_it_has_waited_long_enough():
  queue = FairQueue(patience=10.0)
  ledger = Ledger(TOTAL)

  def fits(one):
    return ledger.fits(one.needs)

  assert ledger.reserve("running", ticket("", size=80).needs)
  queue.put(ticket("big", "a", 30))
  for i in range(4):  # while they pass it, it gathers the credit for its turn
    queue.put(ticket(f"small{i}", "bc"[i % 2], 10, since=float(i)))
    assert queue.pop(float(i), fits).key == f"small{i}"
  queue.put(ticket("small4", "b", 10, since=9.0))
  assert queue.pop(9.9, fits).key == "small4"  # its turn, but not yet at the others' expense
  queue.put(ticket("small5", "c", 10, since=10.0))
  assert queue.pop(10.0, fits) is None  # held, though small5 would fit
  ledger.release("running")
  assert drain(queue, fits, 10.5) == ["big", "small5"]


def test_a_held_turn_ends_with_its_ticket():
  queue = FairQueue(patience=1.0)
  big, small = fill(queue, ticket("big", "a", 90, deadline=5.0), ticket("small", "a", 10))

  def fits(one):
    return one.needs.memory_mb < 50

  assert queue.pop(4.0, fits) is None
  assert queue.expire(4.9) == [] and queue.expire(5.0) == [big]
  assert queue.pop(5.0, fits) is small and not queue.cancel(big)


def test_deadlines_and_the_error():
  queue = FairQueue()
  tickets = fill(queue, *[ticket(str(i), deadline=10.0 - i) for i in range(5)])
  assert queue.expire(5.0) == []
  assert [t.key for t in queue.expire(8.0)] == ["4", "3", "2"]
  assert len(queue) == 2 and queue.oldest() == 0.0
  assert queue.cancel(tickets[0]) and not queue.cancel(tickets[0])
  assert [t.key for t in queue.expire(99.0)] == ["1"] and queue.oldest() is None
  error = timeout_error(tickets[1], 9.0, "memory_mb: 5 needed, 1 free of 100", 3)
  assert isinstance(error, QueueTimeout) and isinstance(error, TimeoutError)
  for part in ("9.0 s", "memory_mb: 5 needed", "tenant 't'", "3 others"):
    assert part in str(error)


def test_one_tenant_cannot_fill_the_queue():
  queue = FairQueue(limit=3)
  fill(queue, *[ticket(str(i), "a") for i in range(3)])
  with pytest.raises(QueueFull, match="tenant 'a' has 3"):
    queue.put(ticket("4", "a"))
  queue.put(ticket("5", "b"))
  assert len(queue) == 4


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_nothing_is_lost_doubled_or_starved(data):
  """Random arrivals and departures: everyone is admitted in the end, within capacity."""
  queue, ledger = FairQueue(patience=20.0), Ledger(TOTAL)
  running, admitted, now = [], [], 0.0
  sizes = data.draw(st.lists(st.integers(1, 100), min_size=1, max_size=40))
  waiting = [
    ticket(str(i), data.draw(st.sampled_from("abc")), size) for i, size in enumerate(sizes)
  ]
  arrivals = iter(waiting)
  for step in range(40 * len(sizes) + 200):
    now += 1.0
    for one in arrivals:
      one.since = now
      queue.put(one)
      break
    while (one := queue.pop(now, lambda t: ledger.fits(t.needs))) is not None:
      assert ledger.reserve(one.key, one.needs)
      admitted.append(one)
      running.append((now + 1 + len(one.key + str(step)) % 5, one))
    for end, one in [entry for entry in running if entry[0] <= now]:
      running.remove((end, one))
      ledger.release(one.key)
    if len(admitted) == len(sizes):
      break
  assert sorted(t.key for t in admitted) == sorted(t.key for t in waiting)
  assert len(queue) == 0 and queue.waiting() == {}
