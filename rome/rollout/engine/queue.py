"""Requests that wait: clients take turns, each client's own come first in, first out."""

import collections
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
  """A queue a client, served round-robin."""

  def __init__(self) -> None:
    self._of: collections.OrderedDict[str, collections.deque[T]] = collections.OrderedDict()

  def __len__(self) -> int:
    return sum(map(len, self._of.values()))

  def __iter__(self) -> Iterator[T]:
    return (item for queue in self._of.values() for item in queue)

  def push(self, client: str, item: T) -> None:
    self._of.setdefault(client, collections.deque()).append(item)

  def push_back(self, client: str, item: T) -> None:
    """Puts an item that was taken before in front of everything else."""
    self._of.setdefault(client, collections.deque()).appendleft(item)
    self._of.move_to_end(client, last=False)

  def peek(self) -> T | None:
    """The item whose turn it is."""
    return next(iter(self._of.values()))[0] if self._of else None

  def pop(self) -> T:
    """Takes the item whose turn it is; its client goes to the end of the line."""
    client, queue = next(iter(self._of.items()))
    item = queue.popleft()
    if queue:
      self._of.move_to_end(client)
    else:
      del self._of[client]
    return item

  def remove(self, item: T) -> bool:
    """Takes an item out of the line; False if it is not there."""
    for client, queue in self._of.items():
      if item in queue:
        queue.remove(item)
        if not queue:
          del self._of[client]
        return True
    return False
