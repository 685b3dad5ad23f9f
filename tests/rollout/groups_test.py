"""Groups: nothing lost, nothing doubled, and without redundancy the same in any order."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rome.rollout.groups import Grouping, Groups, Member


def play(grouping, count, reward, chance, *, slots=3, losses=0, first=0):
  """Plays a batch in an order that `chance` draws; checks what holds at every moment.

  Returns:
    The groups, the members in the order in which they started, and those that were cancelled.
  """
  groups, running, started, cancelled = Groups(grouping, first, count), [], [], []
  finished = set()
  while not groups.done or running:
    while len(running) < slots and (member := groups.take()):
      assert member not in running and member not in finished and member not in cancelled
      running.append(member)
      started.append(member)
    member = running.pop(chance(len(running)))
    if losses and chance(4) == 0:
      losses -= 1
      groups.lose(member)
      continue
    finished.add(member)
    for vain in groups.finish(member, reward(member)):
      running.remove(vain)
      cancelled.append(vain)
  assert groups.take() is None
  assert groups.kept() == sorted(set(groups.kept())) and set(groups.kept()) <= finished
  return groups, started, cancelled


def by_hand(pattern):
  """Rewards of instances by their kind: "0" all fail, "1" all succeed, "x" mixed."""
  return lambda m: float(m.sample % 2 if pattern[m.instance] == "x" else int(pattern[m.instance]))


def in_order(n):
  return 0


@pytest.mark.parametrize(
  ("pattern", "refills", "instances", "kept"),
  [
    ("xxx", 9, 3, [0, 1, 2]),
    ("x0x", 0, 3, [0, 1, 2]),  # no filter
    ("x0xx", 9, 4, [0, 2, 3]),
    ("000xxx", 9, 6, [3, 4, 5]),
    ("x001x1x", 9, 7, [0, 4, 6]),
    ("x001x1x", 2, 5, [0, 1, 4]),  # the bound: the first uniform one fills up
    ("0000", 1, 4, [0, 1, 2]),
  ],
)
def test_filtered_groups_by_hand(pattern, refills, instances, kept):
  groups, _, cancelled = play(Grouping(2, 0, refills), 3, by_hand(pattern), in_order)
  assert groups.instances == instances and groups.filtered == instances - 3 and cancelled == []
  assert groups.kept() == [Member(i, s) for i in kept for s in range(2)]


def test_a_group_is_replaced_at_once():
  groups = Groups(Grouping(2, 0, 1), 5, 2)
  members = [groups.take() for _ in range(4)]
  assert members == [Member(5, 0), Member(5, 1), Member(6, 0), Member(6, 1)]
  assert groups.take() is None
  assert groups.finish(members[2], 1.0) == [] and groups.take() is None
  assert groups.finish(members[3], 1.0) == [] and groups.take() == Member(7, 0)


def test_the_first_finishers_are_kept_and_the_others_end():
  groups = Groups(Grouping(2, 2), 0, 1)
  a, b, c = (groups.take() for _ in range(3))
  assert groups.finish(c, 0.0) == [] and not groups.done
  # One that runs is cancelled, the one that never began is not played.
  assert groups.finish(a, 1.0) == [b] and groups.done and groups.take() is None
  assert groups.kept() == [a, c]


def test_extras_start_behind_everything_that_is_needed():
  groups = Groups(Grouping(2, 1), 0, 2)
  started = [groups.take() for _ in range(6)]
  assert [m.sample for m in started] == [0, 1, 0, 1, 2, 2]


def test_a_lost_member_is_the_next_to_be_played():
  groups = Groups(Grouping(1), 0, 3)
  member = groups.take()
  groups.lose(member)
  assert groups.take() == member


def test_no_groups_are_done():
  groups = Groups(Grouping(2), 0, 0)
  assert groups.done and groups.take() is None and groups.kept() == []


def test_what_does_not_run_cannot_finish():
  groups = Groups(Grouping(1), 0, 1)
  member = groups.take()
  groups.finish(member, 1.0)
  for again in (lambda: groups.finish(member, 1.0), lambda: groups.lose(member)):
    with pytest.raises(KeyError):
      again()


@settings(max_examples=150, deadline=None)
@given(
  st.data(),
  st.integers(1, 4),
  st.integers(0, 4),
  st.integers(0, 5),
  st.lists(st.integers(0, 15), min_size=10, max_size=10),
  st.integers(1, 9),
)
def test_any_order_gives_the_same_batch(data, size, count, refills, outcomes, slots):
  def reward(member):
    return float(outcomes[member.instance] >> member.sample & 1)

  def chance(n):
    return data.draw(st.integers(0, n - 1))

  grouping = Grouping(size, 0, refills)
  calm, _, _ = play(grouping, count, reward, in_order)
  wild, started, cancelled = play(grouping, count, reward, chance, slots=slots, losses=3)
  assert (wild.kept(), wild.instances) == (calm.kept(), calm.instances)
  assert len(wild.kept()) == size * count and cancelled == []
  assert len(set(started)) == size * wild.instances <= size * (count + refills)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3))
@example(None, 1, 1, 1, 0)
def test_redundant_groups_are_full_whatever_the_order(data, size, redundancy, count, refills):
  def chance(n):
    return data.draw(st.integers(0, n - 1)) if data else 0

  grouping = Grouping(size, redundancy, refills)
  groups, started, cancelled = play(
    grouping, count, lambda m: float(m.sample > 1), chance, slots=5, losses=2
  )
  sizes = {}
  for member in groups.kept():
    sizes[member.instance] = sizes.get(member.instance, 0) + 1
  assert len(sizes) == count and set(sizes.values()) == {size}
  assert not set(cancelled) & set(groups.kept())
  # Each that started was kept in full or filtered, or is among the cancelled.
  assert len(set(started)) == size * groups.instances + len(cancelled)
