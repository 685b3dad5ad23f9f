"""On which host a sandbox goes: a scheduler over many hosts, without I/O, clock or threads.

Among the hosts that have room and are not cordoned, "pack" takes the one whose dominant resource
is used most once the sandbox is there (best fit: large sandboxes find room later), "spread" the
one where it is used least (a lost host takes fewer with it). A host that has the image already
counts as fuller or emptier by a bonus, so that images are pulled less often. Ties go to the lower
name: the same calls give the same placements.

Each host has a ledger (`admission.py`), so nothing is ever placed beyond its capacity. A lost host
takes its ledger with it: what it held is reported once and is nobody's from then on, and a release
that comes later frees nothing. When the host comes back, it starts with an empty ledger.
"""

import dataclasses
import operator
from collections.abc import Iterable

from rome.envs.admission import Capacity, Ledger, dominant_share

IMAGE_BONUS = 0.1  # Choice: having the image is worth a tenth of a host's dominant resource.


@dataclasses.dataclass(eq=False)
class Host:
  """A host as the scheduler sees it.

  Attributes:
    name: unique.
    ledger: what it has, and what is placed there.
    images: those that are on it.
    cordoned: takes nothing new.
  """

  name: str
  ledger: Ledger
  images: set[str]
  cordoned: bool = False
  inverse: tuple[float, ...] = dataclasses.field(init=False, repr=False)  # of its capacity

  def __post_init__(self) -> None:
    self.inverse = tuple(1 / t if t else 1.0 for t in self.ledger.total.units())


class Scheduler:
  """Not thread-safe.

  Attributes:
    hosts: by name.
  """

  def __init__(self, strategy: str = "pack"):
    """Starts without hosts.

    Args:
      strategy: "pack" or "spread".
    """
    if strategy not in ("pack", "spread"):
      raise ValueError(f"strategy must be 'pack' or 'spread', not {strategy!r}")
    self._sign = 1.0 if strategy == "pack" else -1.0
    self.hosts: dict[str, Host] = {}
    self._placed: dict[str, Host] = {}

  def join(self, name: str, capacity: Capacity, images: Iterable[str] = ()) -> None:
    """Adds a host, empty. Raises ValueError if it is here: it must be lost before it rejoins."""
    if name in self.hosts:
      raise ValueError(f"host {name!r} is here already")
    self.hosts[name] = Host(name, Ledger(capacity), set(images))

  def lose(self, name: str) -> list[str]:
    """Removes a host; idempotent. Returns the keys that were placed there, each reported once."""
    host = self.hosts.pop(name, None)
    if host is None:
      return []
    lost = [key for key, where in self._placed.items() if where is host]
    for key in lost:
      del self._placed[key]
    return lost

  def cordon(self, name: str, on: bool = True) -> None:
    """Lets a host take nothing new, or (`on=False`) again. What it has stays."""
    self.hosts[name].cordoned = on

  def drain(self, name: str) -> list[str]:
    """Cordons a host. Returns the keys that must leave it before it can go."""
    self.cordon(name)
    return [key for key, where in self._placed.items() if where.name == name]

  def find(self, amount: Capacity, image: str | None = None, host: str | None = None) -> str | None:
    """The host where this would be placed now, None if there is no room.

    Args:
      amount: what is needed.
      image: that it will run.
      host: the only one that will do, for a fork; None: any.
    """
    hosts = self.hosts.values() if host is None else filter(None, [self.hosts.get(host)])
    need = amount.units()
    best: tuple[float, str] | None = None
    for candidate in hosts:
      if candidate.cordoned or any(map(operator.gt, need, candidate.ledger.free_units)):
        continue
      rank = (-self._score(candidate, need, image), candidate.name)
      if best is None or rank < best:
        best = rank
    return None if best is None else best[1]

  def place(
    self, key: str, amount: Capacity, image: str | None = None, host: str | None = None
  ) -> str | None:
    """Places something where `find` says. Returns the host, None if there is no room.

    Raises:
      ValueError: this key is placed already.
    """
    if key in self._placed:
      raise ValueError(f"{key!r} is placed on {self._placed[key].name!r} already")
    name = self.find(amount, image, host)
    if name is None:
      return None
    chosen = self.hosts[name]
    chosen.ledger.reserve(key, amount)
    self._placed[key] = chosen
    if image is not None:
      chosen.images.add(image)  # it will be there by the time the sandbox runs
    return name

  def release(self, key: str) -> bool:
    """Frees what a key holds. Idempotent; returns whether it held anything."""
    host = self._placed.pop(key, None)
    return host is not None and host.ledger.release(key)

  def where(self, key: str) -> str | None:
    """The host of a key, None if it is placed nowhere (any more)."""
    host = self._placed.get(key)
    return None if host is None else host.name

  def could_fit(self, amount: Capacity) -> bool:
    """Whether some host could take this if it were empty."""
    return any(dominant_share(amount, h.ledger.total) <= 1 for h in self.hosts.values())

  def total(self) -> Capacity:
    """What all hosts together have."""
    return add(host.ledger.total for host in self.hosts.values())

  def used(self) -> Capacity:
    """What is placed on all hosts together."""
    return add(host.ledger.used() for host in self.hosts.values())

  def _score(self, host: Host, need: tuple[int, ...], image: str | None) -> float:
    """How much of its dominant resource is used with `need`, with sign and bonus."""
    left = map(operator.sub, host.ledger.free_units, need)
    fill = 1.0 - min(map(operator.mul, left, host.inverse))
    return self._sign * fill + (IMAGE_BONUS if image in host.images else 0.0)


def add(amounts: Iterable[Capacity]) -> Capacity:
  """The sum."""
  sums = [sum(column) for column in zip(*(a.units() for a in amounts), strict=True)] or [0] * 4
  return Capacity(sums[0] / 1000, *sums[1:])
