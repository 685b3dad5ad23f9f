"""The line in front of an engine: requests are checked, numbered, and wait for their turn."""

from collections.abc import Callable

from rome.rollout.engine.queue import FairQueue
from rome.rollout.engine.request import QueueFull, Reply, Request, Update
from rome.rollout.engine.rows import Waiting


class Line:
  """Requests that wait; clients take turns.

  Args:
    check: raises ValueError for a request that can never be served.
    most: requests that may wait.
  """

  def __init__(self, check: Callable[[Request], None], most: int):
    self._check, self._most = check, most
    self._queue: FairQueue[Waiting] = FairQueue()
    self._numbered = 0

  def __len__(self) -> int:
    return len(self._queue)

  def submit(self, request: Request) -> int:
    """Puts a request in line.

    Returns:
      Its id.
    Raises:
      ValueError: it can never be served; the message says why.
      QueueFull: too many requests wait.
    """
    self._check(request)
    if len(self) >= self._most:
      raise QueueFull(f"{len(self)} requests are waiting, no more may; try again later")
    self._numbered += 1
    self._queue.push(request.client, Waiting(self._numbered, request))
    return self._numbered

  def cancel(self, id: int) -> Update | None:
    """Takes a request out of the line; returns its last update, None if it does not wait here."""
    for waiting in self._queue:
      if waiting.id == id:
        self._queue.remove(waiting)
        return Update(id, [], [], [], reply=Reply(id, [], [], -1, "cancelled", 0, []))
    return None

  def push_back(self, waiting: Waiting) -> None:
    """Puts a request that was taken before in front of everything else."""
    self._queue.push_back(waiting.request.client, waiting)

  def peek(self) -> Waiting | None:
    """The request whose turn it is."""
    return self._queue.peek()

  def pop(self) -> Waiting:
    """Takes the request whose turn it is; its client goes to the end of the line."""
    return self._queue.pop()
