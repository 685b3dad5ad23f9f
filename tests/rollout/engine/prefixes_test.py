"""The prefix tree: what is found, what is kept, what is evicted."""

import random

import pytest

from rome.rollout.engine.prefixes import PAGE, Prefixes


def path(prefixes, version, tokens):
  """Files `tokens` page by page and lets go of them; the nodes."""
  nodes, node = [], prefixes.root(version)
  for at in range(0, len(tokens), PAGE):
    part, (page,) = tokens[at : at + PAGE], prefixes.take(1)
    full = len(part) == PAGE
    node = prefixes.fill(node, part, page, None) if full else prefixes.add(node, part, page)
    nodes.append(node)
  for node in reversed(nodes):
    prefixes.release(node)
  return nodes


def walk(prefixes, version, tokens):
  """How many of `tokens` are found."""
  node, found = prefixes.root(version), 0
  while match := prefixes.match(node, tokens[found:]):
    node, count = match
    found += count
    if count < PAGE:
      break
  return found


def test_the_longest_prefix_is_found():
  prefixes = Prefixes(20)
  path(prefixes, 0, list(range(40)))
  assert walk(prefixes, 0, list(range(40))) == 40
  assert walk(prefixes, 0, list(range(38)) + [0] * 9) == 38
  assert walk(prefixes, 0, list(range(17)) + [0] * 9) == 17
  assert walk(prefixes, 0, [5, 6]) == 0 and walk(prefixes, 0, []) == 0
  path(prefixes, 0, list(range(20)) + [99] * 12)
  assert walk(prefixes, 0, list(range(20)) + [99] * 12) == 32
  assert walk(prefixes, 0, list(range(40))) == 40


def test_versions_share_nothing():
  prefixes = Prefixes(20)
  path(prefixes, 0, list(range(32)))
  assert walk(prefixes, 1, list(range(32))) == 0
  path(prefixes, 1, list(range(32)))
  prefixes.drop(0)
  assert walk(prefixes, 0, list(range(32))) == 0 and walk(prefixes, 1, list(range(32))) == 32
  assert prefixes.free == 19 - 2


def test_page_0_is_never_handed_out():
  prefixes = Prefixes(5)
  assert sorted(prefixes.take(4)) == [1, 2, 3, 4] and prefixes.take(1) is None


def test_the_least_recently_used_leaf_goes_first():
  prefixes = Prefixes(5)
  a, b = path(prefixes, 0, [1] * 32), path(prefixes, 0, [2] * 32)
  prefixes.hold(a[1])
  prefixes.release(a[1])  # a was used after b
  (page,) = prefixes.take(1)
  assert page == b[1].page and walk(prefixes, 0, [2] * 32) == 16
  assert walk(prefixes, 0, [1] * 32) == 32
  (page,) = prefixes.take(1)
  assert page == b[0].page


def test_a_page_used_last_goes_last_though_its_child_was_old():
  prefixes = Prefixes(5)
  a, b = path(prefixes, 0, [1] * 32), path(prefixes, 0, [2] * 16)
  prefixes.hold(a[0])
  prefixes.release(a[0])
  order = []
  prefixes._evict, evict = lambda node: (order.append(node), evict(node)), prefixes._evict
  prefixes.take(4)
  assert order == [a[1], b[0], a[0]]


def test_what_cannot_be_had_evicts_nothing():
  prefixes = Prefixes(7)
  a, b = path(prefixes, 0, [1] * 48), path(prefixes, 0, [2] * 32)
  prefixes.hold(b[1])
  assert prefixes.take(5) is None
  assert walk(prefixes, 0, [1] * 48) == 48 and walk(prefixes, 0, [2] * 32) == 32
  assert len(prefixes.take(4)) == 4 and walk(prefixes, 0, [1] * 48) == 0 and a[0].parent is None


def test_the_list_of_what_may_go_stays_short():
  prefixes = Prefixes(5)
  node = path(prefixes, 0, [1] * 16)[0]
  for _ in range(1000):
    prefixes.hold(node)
    prefixes.release(node)
  assert len(prefixes._oldest) <= 11 and len(prefixes.take(4)) == 4


def test_what_is_held_stays_with_all_in_front_of_it():
  prefixes = Prefixes(5)
  a = path(prefixes, 0, [1] * 48)
  prefixes.hold(a[2])
  assert prefixes.take(2) is None and prefixes.take(1) is not None
  assert walk(prefixes, 0, [1] * 48) == 48
  prefixes.release(a[2])
  assert len(prefixes.take(3)) == 3 and walk(prefixes, 0, [1] * 48) == 0


def test_a_leaf_grows():
  prefixes = Prefixes(5)
  node = prefixes.add(prefixes.root(0), [1, 2], *prefixes.take(1))
  prefixes.grow(node, [1, 2, 3])
  assert walk(prefixes, 0, [1, 2, 3, 4]) == 3
  assert prefixes.fill(prefixes.root(0), [*range(1, PAGE + 1)], node.page, node) is node
  assert prefixes.match(prefixes.root(0), [*range(1, 40)]) == (node, PAGE)


def test_the_same_page_computed_twice_is_kept_once():
  prefixes = Prefixes(6)
  a = path(prefixes, 0, [1] * PAGE)[0]
  b = path(prefixes, 0, [1] * PAGE)[0]
  assert a is b and prefixes.free == 4
  # The same where a part of the second was filed before.
  tail = prefixes.add(prefixes.root(0), [1] * 3, *prefixes.take(1))
  assert prefixes.fill(prefixes.root(0), [1] * PAGE, tail.page, tail) is a
  assert prefixes.free == 4 and tail.parent is None
  prefixes.release(a)
  assert len(prefixes.take(5)) == 5 and walk(prefixes, 0, [1] * PAGE) == 0


def test_a_version_in_use_is_not_dropped():
  prefixes = Prefixes(5)
  prefixes.hold(path(prefixes, 0, [1] * PAGE)[0])
  with pytest.raises(AssertionError, match="while a request runs"):
    prefixes.drop(0)


@pytest.mark.parametrize("seed", range(5))
def test_no_page_is_lost_or_doubled(seed):
  """Random holders of random paths against a model: every page is free, owned or filed once."""
  rng, prefixes, total = random.Random(seed), Prefixes(24), 23
  holders = []  # (version, node, own pages)
  for _ in range(600):
    act = rng.random()
    if act < 0.5:
      version, tokens = rng.randrange(2), [rng.randrange(2) for _ in range(3 * PAGE)]
      tokens = [t for t in tokens[:3] for _ in range(PAGE)]
      node = prefixes.root(version)
      prefixes.hold(node)
      for at in range(0, len(tokens), PAGE):
        match = prefixes.match(node, tokens[at:])
        if match and match[1] == PAGE:
          child = match[0]
          prefixes.hold(child)
        else:
          own = prefixes.take(1)
          if own is None:
            break
          child = prefixes.fill(node, tokens[at : at + PAGE], own[0], None)
        prefixes.release(node)
        node = child
      holders.append((version, node, prefixes.take(rng.randrange(3)) or []))
    elif holders:
      version, node, own = holders.pop(rng.randrange(len(holders)))
      prefixes.give_back(own)
      prefixes.release(node)
      if rng.random() < 0.2 and not any(v == version for v, _, _ in holders):
        prefixes.drop(version)
    filed = []
    stack = list(prefixes._roots.values())
    while stack:
      node = stack.pop()
      filed += [node.page] if node.page >= 0 else []
      stack += [c for group in node.children.values() for c in group]
    everything = filed + prefixes._free + [page for _, _, own in holders for page in own]
    assert sorted(everything) == list(range(1, total + 1))
