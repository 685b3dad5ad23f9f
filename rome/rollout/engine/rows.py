"""One request in one slot, and the pages that hold its context."""

import dataclasses

from rome.rollout.engine.prefixes import PAGE, Node, Prefixes
from rome.rollout.engine.request import Alternatives, Reply, Request, Update
from rome.rollout.engine.text import TextStream


@dataclasses.dataclass(eq=False)
class Waiting:
  """A request without a slot."""

  id: int
  request: Request


class Row:
  """A request in a slot.

  `tokens` are its context and what was sampled; keys and values of the first `done` are known.
  The first `shared` pages are nodes of the prefix tree, the deepest of which is `node`; then comes
  `tail`, a node that is not full yet, if there is one; then pages of its own. `moved` says that
  `pages` changed since the engine copied them; `turn` is the step that last computed for it.
  """

  def __init__(self, id: int, request: Request, version: int, prefixes: Prefixes):
    self.id, self.request, self.version = id, request, version
    self.tokens = list(request.context)
    self.done = self.cached = self.shared = 0
    self.pages: list[int] = []
    self.moved, self.turn = True, 0
    self.node: Node = prefixes.root(version)
    self.tail: Node | None = None
    self.logps: list[float] = []
    self.top: list[Alternatives] = []
    self.text: TextStream | None = None
    self.stop: frozenset[int] = frozenset()
    self._prefixes = prefixes
    prefixes.hold(self.node)

  @property
  def target(self) -> int:
    """Tokens to prefill: all of the context but the last, which the decode feeds."""
    return len(self.request.context) - 1

  @property
  def left(self) -> int:
    """Tokens that may still be sampled."""
    return self.request.max_tokens - len(self.logps)

  def part(self, budget: int) -> int:
    """How many context tokens to compute at once: up to the end of a page, or of the context.

    What it says depends on the row alone, so that its neighbours do not decide where it is cut.
    """
    end = min(self.done + budget, self.target)
    return (end if end == self.target else end - end % PAGE) - self.done

  def reserve(self) -> bool:
    """Finds the whole pages that are known already and takes pages for the rest, or nothing."""
    while self._share():
      pass
    needed = -(-(len(self.request.context) + self.request.max_tokens) // PAGE)
    own = self._prefixes.take(needed - self.shared)
    if own is None:
      self._prefixes.release(self.node)
      return False
    self.pages += own
    return True

  @property
  def page_start(self) -> int:
    """Where the page begins in which the row goes on."""
    return self.shared * PAGE

  def next_page(self) -> tuple[int, ...]:
    """The context tokens of that page."""
    return tuple(self.tokens[self.page_start : min(self.page_start + PAGE, self.target)])

  def _share(self) -> bool:
    """Goes on by one page that is in the tree, if all of it is wanted."""
    found = self._prefixes.match(self.node, self.next_page())
    if found is None or found[1] < PAGE:
      return False
    child, _ = found
    self._prefixes.hold(child)
    self._prefixes.release(self.node)
    if self.shared < len(self.pages):  # A page of its own was meant for this.
      self._prefixes.give_back([self.pages[self.shared]])
      self.pages[self.shared] = child.page
    else:
      self.pages.append(child.page)
    self.node, self.moved = child, True
    self.shared += 1
    self._know(self.page_start)
    return True

  def _know(self, done: int) -> None:
    self.cached += done - self.done
    self.done = done

  def catch_up(self) -> tuple[int, int] | None:
    """Takes over what the tree has meanwhile; a page (source, target) to copy for its beginning."""
    if self.done >= self.target:
      return None
    while self._share():
      pass
    found = self._prefixes.match(self.node, self.next_page())
    if found is None or self.page_start + found[1] <= self.done:
      return None
    child, count = found
    self._prefixes.hold(child)  # it was used just now
    self._prefixes.release(child)
    self._know(self.page_start + count)
    return child.page, self.pages[self.shared]

  def advance(self, count: int, ended: bool = False) -> None:
    """Keys and values of `count` more tokens are known: files full pages, and the last part."""
    self.done += count
    while self.done >= (self.shared + 1) * PAGE:
      tokens = self.tokens[self.shared * PAGE : (self.shared + 1) * PAGE]
      page = self.pages[self.shared]
      node = self._prefixes.fill(self.node, tokens, page, self.tail)
      self._prefixes.release(self.node)
      self.node, self.tail, self.pages[self.shared] = node, None, node.page
      self.moved |= node.page != page
      self.shared += 1
    rest = self.tokens[self.shared * PAGE : self.done]
    if not rest:
      return
    if self.tail:
      self._prefixes.grow(self.tail, rest)
    elif ended:
      self.tail = self._prefixes.add_last(self.node, rest, self.pages[self.shared])
    elif self.done == self.target:  # others of its group want it now
      self.tail = self._prefixes.add(self.node, rest, self.pages[self.shared])

  def close(self) -> None:
    """Lets go of everything; what it computed stays in the tree."""
    self._prefixes.give_back(self.pages[self.shared + (self.tail is not None) :])
    for node in (self.tail, self.node):
      if node:
        self._prefixes.release(node)

  def take(self, tokens: list[int], logps: list[float], top: list[Alternatives]) -> str:
    """Adds sampled tokens up to one that completes a stop string; "stop" if one did, else ""."""
    for i, token in enumerate(tokens):
      self.tokens.append(token)
      self.logps.append(logps[i])
      if self.request.top_logps:
        self.top.append(top[i])
      if self.text and token not in self.stop and self.text.push(token):
        return "stop"
    return ""

  def update(self, before: int, reply: Reply | None) -> Update:
    """What came after the first `before` tokens of the reply."""
    at = len(self.request.context) + before
    text = self.text.take() if self.text and self.request.text else ""
    return Update(self.id, self.tokens[at:], self.logps[before:], self.top[before:], text, reply)
