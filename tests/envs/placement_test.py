"""The scheduler: which host is chosen, what a lost one takes with it, and a small simulation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.placement import simulate
from rome.envs.admission import Capacity
from rome.envs.placement import Scheduler, add

HOST = Capacity(10.0, 1000, 1000, 1000)


def size(memory, cpus=1.0):
  return Capacity(cpus, memory, 10, 10)


def scheduler(strategy="pack", hosts="abc"):
  made = Scheduler(strategy)
  for name in hosts:
    made.join(name, HOST)
  return made


def test_packing_takes_the_fullest_that_still_has_room():
  pack = scheduler()
  assert [pack.place(str(i), size(400)) for i in range(5)] == ["a", "a", "b", "b", "c"]
  assert pack.place("small", size(200)) == "a"  # exactly full
  assert pack.place("big", size(700)) is None and pack.find(size(600)) == "c"


def test_spreading_takes_the_emptiest():
  spread = scheduler("spread")
  assert [spread.place(str(i), size(400)) for i in range(6)] == list("abcabc")


def test_the_dominant_resource_decides():
  pack = scheduler(hosts="ab")
  pack.place("memory", size(500, cpus=0.1), host="a")
  pack.place("cpus", size(10, cpus=8.0), host="b")
  assert pack.place("next", size(10, cpus=1.0)) == "b"


def test_an_image_that_is_there_counts():
  pack = scheduler(hosts="ab")
  pack.place("x", size(50), host="a")
  assert pack.place("y", size(10), image="i", host="b") == "b"
  assert pack.find(size(10)) == "a" and pack.find(size(10), image="i") == "b"
  pack.place("z", size(500), host="a")
  assert pack.find(size(10), image="i") == "a"  # but not for everything


def test_cordon_drain_and_loss():
  pack = scheduler(hosts="ab")
  for key in "xyz":
    assert pack.place(key, size(100)) == "a"
  assert sorted(pack.drain("a")) == ["x", "y", "z"]
  assert pack.place("w", size(100)) == "b" and pack.find(size(100), host="a") is None
  pack.cordon("a", False)
  assert pack.release("x") and not pack.release("x")
  assert sorted(pack.lose("a")) == ["y", "z"] and pack.lose("a") == []
  assert not pack.release("y") and pack.where("y") is None and pack.where("w") == "b"
  assert pack.total() == HOST and pack.used() == size(100)
  pack.join("a", HOST)
  assert pack.place("y", size(1000)) == "a"  # empty again, and a key may come again
  with pytest.raises(ValueError, match="'a' is here already"):
    pack.join("a", HOST)
  with pytest.raises(ValueError, match="'w' is placed on 'b'"):
    pack.place("w", size(1))
  with pytest.raises(ValueError, match="strategy"):
    Scheduler("random")


def test_what_could_never_fit():
  pack = scheduler()
  assert pack.could_fit(size(1000)) and not pack.could_fit(size(1001))
  assert not Scheduler().could_fit(size(1)) and Scheduler().total() == Capacity(0, 0, 0, 0)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_books_agree_under_any_order(data):
  """Against plain dictionaries: never over capacity, nothing twice, losses reported once."""
  made = scheduler(data.draw(st.sampled_from(["pack", "spread"])))
  books = {name: {} for name in "abc"}
  for step in range(data.draw(st.integers(1, 60))):
    action = data.draw(st.sampled_from(["place", "place", "place", "release", "lose", "join"]))
    name = data.draw(st.sampled_from("abc"))
    if action == "place":
      amount = size(data.draw(st.integers(1, 700)), data.draw(st.integers(1, 70)) / 10)
      room = any((add([*b.values(), amount]).memory_mb <= 1000) for b in books.values())
      host = made.place(str(step), amount)
      if host is not None:
        books[host][str(step)] = amount
      elif not room:
        assert not any(made.find(amount, host=h) for h in books)
    elif action == "release":
      key = str(data.draw(st.integers(0, 60)))
      holders = [book for book in books.values() if key in book]
      assert made.release(key) is bool(holders)
      for book in holders:
        del book[key]
    elif action == "lose":
      assert sorted(made.lose(name)) == sorted(books.pop(name, {}))
    elif name not in books:
      made.join(name, HOST)
      books[name] = {}
    for host, book in books.items():
      held = add(book.values())
      assert made.hosts[host].ledger.used() == held
      assert all(h <= t for h, t in zip(held.units(), HOST.units(), strict=True))


@pytest.mark.parametrize("strategy", ["pack", "spread"])
def test_a_simulated_fleet(strategy):
  result = simulate(sandboxes=400, hosts=8, strategy=strategy, seed=1)
  assert result["double_allocations"] == result["over_capacity"] == 0
  assert result["host_failures"] >= 1 and result["lost"] > 0
  assert result["waited"] > 0 and result["peak_waiting"] > 0 and result["wait_max_s"] > 0
  again = simulate(sandboxes=400, hosts=8, strategy=strategy, seed=1)
  timing = ("seconds", "us_per_placement")
  assert all(again[key] == value for key, value in result.items() if key not in timing)


def test_the_simulation_counts_what_a_broken_scheduler_does(monkeypatch):
  right = Scheduler.join
  monkeypatch.setattr(
    Scheduler, "join", lambda self, name, capacity: right(self, name, add([capacity] * 2))
  )
  result = simulate(sandboxes=400, hosts=8)
  assert result["over_capacity"] > 0 and result["double_allocations"] == 0
  monkeypatch.setattr(Scheduler, "join", right)

  def forgetful(self, name):
    host = self.hosts.pop(name, None)
    return [key for key, where in self._placed.items() if where is host]

  monkeypatch.setattr(Scheduler, "lose", forgetful)
  result = simulate(sandboxes=400, hosts=8, seed=1)
  assert result["double_allocations"] == result["lost"] > 0 == result["over_capacity"]
