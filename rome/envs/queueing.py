"""The queue of creations that wait for room: fair between tenants, with deadlines.

Choice: deficit round robin by tenant, with a vanishing quantum. A tenant's turn costs the dominant
share of what it asks for. While one tenant gathers the credit that its first request costs, every
waiting tenant gathers as much; the one that needs least comes next, and among equals the one that
was served longest ago. So a tenant with 1,000 waiting is served once, and then one that has just
come with a single request of the same size. Credit is worth only something while one waits, and
never more than the first request costs: nothing is saved up. New tenants queue behind old ones, so
that even a stream of them starves nobody. Within a tenant the order is that of arrival.

Choice: aging against starvation of big requests. A request that does not fit is passed over for
others that do, until it has waited for `patience` seconds. From then on its turn is held: nothing
else is admitted before it, so that what becomes free adds up. A request that can never fit must not
be put here.

There is no clock here and no lock: the owner brings both.
"""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable

from rome.envs.admission import Capacity
from rome.envs.common import SandboxError

PATIENCE = 10.0  # seconds


class QueueFull(SandboxError):
  """A tenant has as many creations waiting as it may."""


class QueueTimeout(SandboxError, TimeoutError):
  """A creation's deadline passed while it waited; the message says for how long, and for what."""


@dataclasses.dataclass(eq=False)
class Ticket:
  """A creation that waits.

  Attributes:
    key: of what is to be created.
    tenant: on whose behalf.
    needs: what must be free for it.
    cost: dominant share of the total, what a turn costs.
    since, deadline: times, seconds.
  """

  key: str
  tenant: str
  needs: Capacity
  cost: float
  since: float
  deadline: float


@dataclasses.dataclass(eq=False)
class _Line:
  """One tenant's tickets in order of arrival, its credit, and when it last had its turn."""

  turn: int
  credit: float = 0.0
  tickets: "collections.OrderedDict[Ticket, None]" = dataclasses.field(
    default_factory=collections.OrderedDict
  )

  def head(self) -> Ticket:
    return next(iter(self.tickets))


class FairQueue:
  """See the module."""

  def __init__(self, patience: float = PATIENCE, limit: int = 10_000):
    """Starts empty.

    Args:
      patience: seconds after which a request that does not fit holds its turn.
      limit: tickets that one tenant may have here.
    """
    self._patience, self._limit = patience, limit
    self._lines: dict[str, _Line] = {}
    self._deadlines: list[tuple[float, int, Ticket]] = []  # a heap; may hold some that have left
    self._count = itertools.count()
    self._size = 0

  def __len__(self) -> int:
    return self._size

  def waiting(self) -> dict[str, int]:
    """How many wait, by tenant."""
    return {tenant: len(line.tickets) for tenant, line in self._lines.items()}

  def oldest(self) -> float | None:
    """Since when the one waits that has waited longest."""
    return min((line.head().since for line in self._lines.values()), default=None)

  def first(self) -> Ticket | None:
    """The ticket whose turn is next, whether or not there is room for it."""
    line = min(self._lines.values(), key=_order, default=None)
    return None if line is None else line.head()

  def put(self, ticket: Ticket) -> None:
    """Adds a ticket.

    Raises:
      QueueFull: its tenant has too many here.
    """
    line = self._lines.get(ticket.tenant)
    if line is None:
      line = self._lines[ticket.tenant] = _Line(next(self._count))
    elif len(line.tickets) >= self._limit:
      raise QueueFull(
        f"tenant {ticket.tenant!r} has {self._limit} creations waiting: wait for some of them"
      )
    line.tickets[ticket] = None
    heapq.heappush(self._deadlines, (ticket.deadline, next(self._count), ticket))
    self._size += 1

  def cancel(self, ticket: Ticket) -> bool:
    """Takes a ticket out, out of turn. Returns whether it was here."""
    line = self._lines.get(ticket.tenant)
    if line is None or ticket not in line.tickets:
      return False
    del line.tickets[ticket]
    self._size -= 1
    if not line.tickets:
      del self._lines[ticket.tenant]
    if len(self._deadlines) > 2 * self._size + 64:
      self._deadlines = [entry for entry in self._deadlines if self._has(entry[2])]
      heapq.heapify(self._deadlines)
    return True

  def expire(self, now: float) -> list[Ticket]:
    """Takes out the tickets whose deadlines have passed, and returns them."""
    expired = []
    while self._deadlines and self._deadlines[0][0] <= now:
      ticket = heapq.heappop(self._deadlines)[2]
      if self.cancel(ticket):
        expired.append(ticket)
    return expired

  def pop(self, now: float, fits: Callable[[Ticket], bool]) -> Ticket | None:
    """Takes out the ticket whose turn it is, None if nothing (more) can be admitted now.

    Args:
      now: seconds.
      fits: whether a ticket could be admitted.
    """
    for line in sorted(self._lines.values(), key=_order):
      ticket = line.head()
      if fits(ticket):
        self._serve(line, ticket)
        return ticket
      if now - ticket.since >= self._patience:
        return None
    return None

  def _serve(self, chosen: _Line, ticket: Ticket) -> None:
    gathered = _missing(chosen)
    for line in self._lines.values():
      line.credit = min(line.credit + gathered, line.head().cost)
    chosen.credit = 0.0
    chosen.turn = next(self._count)
    self.cancel(ticket)

  def _has(self, ticket: Ticket) -> bool:
    line = self._lines.get(ticket.tenant)
    return line is not None and ticket in line.tickets


def _missing(line: _Line) -> float:
  return max(0.0, line.head().cost - line.credit)


def _order(line: _Line) -> tuple[float, int]:
  return _missing(line), line.turn


def timeout_error(ticket: Ticket, now: float, shortage: str, ahead: int) -> QueueTimeout:
  """The error for a ticket that expired.

  Args:
    ticket: it.
    now: seconds.
    shortage: what there was too little of; '' if there was room, but others had their turn.
    ahead: how many others were waiting.
  """
  short = shortage or "the turn of others came first"
  return QueueTimeout(
    f"no room for {ticket.key} (tenant {ticket.tenant!r}) within {now - ticket.since:.1f} s, "
    f"{ahead} others waiting; short of {short}: stop some, raise the deadline or add a host"
  )
