"""Which page holds the keys and values of which tokens: a radix tree a version, and the free list.

A node is one page: up to PAGE tokens that follow on those of its ancestors. Only full pages have
children. Trees of different versions share nothing, so what old weights computed is never reused
under new ones. A holder counts itself on the deepest node of its path, which keeps the whole path:
only leaves are evicted, the least recently used first. Evicted prefixes are computed again.

Source: the prefix tree of SGLang (arXiv:2312.07104), the pages of vLLM (arXiv:2309.06180). Choice:
full pages are found by hash, and a page that is shared in part among the siblings that begin with
the same token, one by one. Left out: nodes that span several pages, and moving evicted pages to
slower memory.
"""

import heapq
import itertools
from collections.abc import Sequence

PAGE = 16  # tokens


class Node:
  """One page of a tree.

  Attributes:
    tokens: what the page holds; fewer than PAGE in a leaf that may still grow.
    page: its number; -1 for a root.
    parent: the page in front of it; None for a root and for what was evicted.
    version: of the weights.
    holders: how many hold on to it.
    used: when it was last taken up or let go of.
  """

  __slots__ = ("children", "full", "holders", "page", "parent", "tokens", "used", "version")

  def __init__(self, version: int, page: int, tokens: tuple[int, ...], parent: "Node | None"):
    self.version, self.page, self.tokens, self.parent = version, page, tokens, parent
    self.children: dict[int, list[Node]] = {}  # by first token
    self.full: dict[tuple[int, ...], Node] = {}  # those that hold PAGE tokens
    self.holders = self.used = 0


class Prefixes:
  """The trees and the free pages. Page 0 is never handed out: rows without a request point at it.

  Args:
    pages: how many there are, page 0 included.
  Attributes:
    returned: counts how often pages came back or could be evicted again.
  """

  def __init__(self, pages: int):
    self.total = pages
    self._free = list(range(pages - 1, 0, -1))
    self._roots: dict[int, Node] = {}
    self._idle: set[Node] = set()  # leaves that nobody holds
    # Those by last use, (used, unique, node); entries of nodes that were used since are stale.
    self._oldest: list[tuple[int, int, Node]] = []
    self._clock = itertools.count(1)
    self.returned = 0

  @property
  def free(self) -> int:
    """Pages that can be had without evicting."""
    return len(self._free)

  def root(self, version: int) -> Node:
    """Where the contexts of a version begin."""
    return self._roots.setdefault(version, Node(version, -1, (), None))

  def match(self, node: Node, tokens: Sequence[int]) -> tuple[Node, int] | None:
    """The child of `node` that shares most with the next `tokens`, and how many (at least one)."""
    if not tokens:
      return None
    exact = node.full.get(tuple(tokens[:PAGE]))
    if exact is not None:
      return exact, PAGE
    best, most = None, 0
    for child in node.children.get(tokens[0], ()):
      count = _common(child.tokens, tokens)
      if count > most:
        best, most = child, count
    return (best, most) if best else None

  def known(self, version: int, tokens: Sequence[int]) -> int:
    """How many tokens from the first one on are in the tree of a version."""
    node, count = self.root(version), 0
    while found := self.match(node, tokens[count : count + PAGE]):
      node, shared = found
      count += shared
      if shared < PAGE:
        break
    return count

  def hold(self, node: Node) -> None:
    node.holders += 1
    node.used = next(self._clock)
    self._idle.discard(node)

  def release(self, node: Node) -> None:
    node.holders -= 1
    node.used = next(self._clock)
    self._may_go(node)

  def _may_go(self, node: Node) -> None:
    """Notes a leaf that nobody holds."""
    if node.parent and not node.holders and not node.children:
      self._idle.add(node)
      heapq.heappush(self._oldest, (node.used, next(self._clock), node))
      self.returned += 1
      if len(self._oldest) > 2 * self.total:  # mostly stale
        self._oldest = [(n.used, next(self._clock), n) for n in self._idle]
        heapq.heapify(self._oldest)

  def add(self, parent: Node, tokens: Sequence[int], page: int) -> Node:
    """Files a page that the caller has filled in part, and holds it for the caller."""
    node = Node(parent.version, page, tuple(tokens), parent)
    parent.children.setdefault(node.tokens[0], []).append(node)
    self._idle.discard(parent)
    self.hold(node)
    return node

  def add_last(self, parent: Node, tokens: Sequence[int], page: int) -> Node | None:
    """Files the last, partial page of a row that has ended, and holds it for the caller.

    Returns:
      Its node; None if another leaf has all of `tokens`: the page stays the caller's own.
    """
    found = self.match(parent, tokens)
    if found and found[1] == len(tokens):
      self.hold(found[0])
      self.release(found[0])
      return None
    for sibling in list(parent.children.get(tokens[0], ())):
      if sibling in self._idle and sibling.tokens == tuple(tokens[: len(sibling.tokens)]):
        self._evict(sibling)
    return self.add(parent, tokens, page)

  def grow(self, node: Node, tokens: Sequence[int]) -> None:
    """A leaf that the caller alone holds has more tokens now."""
    node.tokens = tuple(tokens)

  def fill(self, parent: Node, tokens: Sequence[int], page: int, tail: Node | None) -> Node:
    """Files a full page, and holds it for the caller.

    Args:
      parent: the page in front of it.
      tokens: PAGE of them.
      page: the caller's page that holds them.
      tail: its node, if a part of it was filed before; the caller's hold on it passes on.
    Returns:
      Its node; or another one with the same tokens, if there is one: `page` is then free.
    """
    twin = parent.full.get(tuple(tokens))
    if twin:
      if tail:
        self._detach(tail)
      self.give_back([page])
      self.hold(twin)
      return twin
    node = tail or self.add(parent, tokens, page)
    self.grow(node, tokens)
    parent.full[node.tokens] = node
    return node

  def take(self, count: int) -> list[int] | None:
    """`count` pages of the caller's own, evicting what nobody holds.

    Returns:
      None if there are too few; nothing was evicted then.
    """
    missing = count - len(self._free)
    if missing > len(self._idle) and missing > self._unheld():
      return None
    while len(self._free) < count:
      used, _, node = heapq.heappop(self._oldest)
      if node in self._idle and node.used == used:
        self._evict(node)
    return [self._free.pop() for _ in range(count)]

  def _unheld(self) -> int:
    """Pages of nodes that nobody holds, themselves or by what follows on them."""
    nodes = list(self._roots.values())
    for node in nodes:  # grows: parents come before their children
      nodes += [child for group in node.children.values() for child in group]
    held: set[Node] = set()
    for node in reversed(nodes):
      if node.parent and (node.holders or node in held):
        held |= {node, node.parent}
    return sum(node.parent is not None and node not in held for node in nodes)

  def give_back(self, pages: Sequence[int]) -> None:
    """Frees pages that are in no tree."""
    self._free += pages
    self.returned += len(pages)

  def _detach(self, node: Node) -> Node:
    """Takes a leaf out of its tree; its parent."""
    parent = node.parent
    assert parent is not None
    siblings = parent.children[node.tokens[0]]
    siblings.remove(node)
    if not siblings:
      del parent.children[node.tokens[0]]
    if parent.full.get(node.tokens) is node:
      del parent.full[node.tokens]
    node.parent = None
    return parent

  def _evict(self, node: Node) -> None:
    self._idle.discard(node)
    parent = self._detach(node)
    self._free.append(node.page)
    self._may_go(parent)

  def drop(self, version: int) -> None:
    """Forgets a version that no request runs on; all its pages are free."""
    root = self._roots.pop(version, None)
    stack = [root] if root else []
    while stack:
      node = stack.pop()
      assert not node.holders or node is root, "a version is dropped while a request runs on it"
      stack += [child for group in node.children.values() for child in group]
      if node is not root:
        self._idle.discard(node)
        self.give_back([node.page])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """How many tokens two sequences begin with alike."""
  count = 0
  for x, y in zip(a, b, strict=False):
    if x != y:
      break
    count += 1
  return count
