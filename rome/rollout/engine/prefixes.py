"""Which page holds the keys and values of which tokens: a radix tree a version, and the free list.

A node is one page: up to PAGE tokens that follow on those of its ancestors. Only full pages have
children. Trees of different versions share nothing, so what old weights computed is never reused
under new ones. A holder counts itself on the deepest node of its path, which keeps the whole path:
only leaves are evicted, the least recently used first. Evicted prefixes are computed again.

Source: the prefix tree of SGLang (arXiv:2312.07104), the pages of vLLM (arXiv:2309.06180). Left
out: nodes that span several pages, and moving evicted pages to slower memory.
"""

import collections
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
  """

  __slots__ = ("children", "full", "holders", "page", "parent", "tokens", "version")

  def __init__(self, version: int, page: int, tokens: tuple[int, ...], parent: "Node | None"):
    self.version, self.page, self.tokens, self.parent = version, page, tokens, parent
    self.children: dict[int, list[Node]] = {}  # by first token
    self.full: dict[tuple[int, ...], Node] = {}  # those that hold PAGE tokens
    self.holders = 0


class Prefixes:
  """The trees and the free pages. Page 0 is never handed out: rows without a request point at it.

  Args:
    pages: how many there are, page 0 included.
  """

  def __init__(self, pages: int):
    self.total = pages
    self._free = list(range(pages - 1, 0, -1))
    self._roots: dict[int, Node] = {}
    self._idle: collections.OrderedDict[Node, None] = collections.OrderedDict()  # oldest first

  @property
  def free(self) -> int:
    """Pages that can be had without evicting."""
    return len(self._free)

  @property
  def evictable(self) -> int:
    """Pages of leaves that nobody holds; their ancestors may follow."""
    return len(self._idle)

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

  def hold(self, node: Node) -> None:
    node.holders += 1
    self._idle.pop(node, None)

  def release(self, node: Node) -> None:
    node.holders -= 1
    if node.parent and not node.holders and not node.children:
      self._idle[node] = None

  def add(self, parent: Node, tokens: Sequence[int], page: int) -> Node:
    """Files a page that the caller has filled in part, and holds it for the caller."""
    node = Node(parent.version, page, tuple(tokens), parent)
    parent.children.setdefault(node.tokens[0], []).append(node)
    self._idle.pop(parent, None)
    self.hold(node)
    return node

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
      self._free.append(page)
      self.hold(twin)
      return twin
    node = tail or self.add(parent, tokens, page)
    self.grow(node, tokens)
    parent.full[node.tokens] = node
    return node

  def take(self, count: int) -> list[int] | None:
    """`count` pages of the caller's own, evicting what nobody holds; None if there are too few."""
    while len(self._free) < count and self._idle:
      self._evict(next(iter(self._idle)))
    if len(self._free) < count:
      return None
    return [self._free.pop() for _ in range(count)]

  def give_back(self, pages: Sequence[int]) -> None:
    """Frees pages that are in no tree."""
    self._free += pages

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
    del self._idle[node]
    parent = self._detach(node)
    self._free.append(node.page)
    if parent.parent and not parent.holders and not parent.children:
      # It is older than any leaf that is used more recently than this one was.
      self._idle[parent] = None
      self._idle.move_to_end(parent, last=False)

  def drop(self, version: int) -> None:
    """Forgets a version that no request runs on; all its pages are free."""
    root = self._roots.pop(version, None)
    stack = [root] if root else []
    while stack:
      node = stack.pop()
      assert not node.holders or node is root, "a version is dropped while a request runs on it"
      stack += [child for group in node.children.values() for child in group]
      if node is not root:
        self._idle.pop(node, None)
        self._free.append(node.page)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """How many tokens two sequences begin with alike."""
  count = 0
  for x, y in zip(a, b, strict=False):
    if x != y:
      break
    count += 1
  return count
