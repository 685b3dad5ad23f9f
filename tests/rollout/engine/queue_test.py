"""Clients take turns; a client's own requests keep their order."""

from rome.rollout.engine.queue import FairQueue


def filled(**clients):
  queue = FairQueue()
  for client, items in clients.items():
    for item in items:
      queue.push(client, item)
  return queue


def drain(queue):
  out = []
  while queue:
    assert queue.peek() == (item := queue.pop())
    out.append(item)
  return out


def test_clients_take_turns():
  assert drain(filled(a="1234", b="x", c="yz")) == ["1", "x", "y", "2", "z", "3", "4"]


def test_a_flood_delays_another_client_by_one():
  queue = filled(a=range(1000))
  queue.pop()
  queue.push("b", "late")
  assert [queue.pop(), queue.pop()] == [1, "late"]


def test_what_is_pushed_back_comes_first():
  queue = filled(a="12", b="x")
  queue.push_back("b", "again")
  assert drain(queue) == ["again", "1", "x", "2"]


def test_removal():
  queue = filled(a="12", b="x")
  assert queue.remove("1") and not queue.remove("1") and queue.remove("x")
  assert list(queue) == ["2"] and len(queue) == 1
  assert drain(queue) == ["2"] and queue.peek() is None
