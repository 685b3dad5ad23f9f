"""What a sandbox may reach: an allow-list of host and port, checked twice.

First by name or address as the agent asked for it; then, once an allowed name is resolved, by the
address it led to, so that a name cannot lead into the host's own network (DNS rebinding). The
connection is made to the very address that was checked.

Left out: rules by URL or method (an allowed host is allowed whole, and behind a shared front an
allowed TLS host may serve others), ports by range, and refusal lists: everything else is refused.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Iterable, Mapping

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

PROXY_PORT, DNS_PORT = 3128, 53  # of 127.0.0.1 in the sandbox
MAX_RULES = 256
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+")
# Served by cloud providers to their machines, though the address looks public.
_METADATA = frozenset([ipaddress.ip_address("168.63.129.16")])
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class PolicyError(ValueError):
  """A rule or a destination that cannot be meant; the message names it."""


@dataclasses.dataclass(frozen=True)
class NetworkPolicy:
  """What one sandbox may reach. A sandbox without a policy has no network but its own loopback.

  Attributes:
    allow: rules "host:port". The host is an exact name, "*." and a name (its subdomains, not
      itself), an IPv4 address, or an IPv6 address in brackets.
    forward: ports of the sandbox's 127.0.0.1 that lead to a host and port outside, whatever
      `allow` says: the model's endpoint, for one. A mapping, kept as a sorted tuple of items.
    max_bytes: that the sandbox may send and receive in an episode, in all.
    max_connections: open at once.
    idle_timeout: seconds without a byte in either direction, after which a connection is closed.
    total_timeout: seconds that a connection may last.
  """

  allow: tuple[str, ...] = ()
  forward: Mapping[int, tuple[str, int]] | tuple[tuple[int, tuple[str, int]], ...] = ()
  max_bytes: int = 1 << 30
  max_connections: int = 256
  idle_timeout: float = 60.0
  total_timeout: float = 3600.0

  def __post_init__(self) -> None:
    given: object = self.allow
    if isinstance(given, str) or not isinstance(given, Iterable):
      raise PolicyError(f"NetworkPolicy.allow must be a tuple of rules, not {given!r}")
    rules = tuple(sorted({_canonical_rule(rule) for rule in given}))
    if len(rules) > MAX_RULES:
      raise PolicyError(f"NetworkPolicy.allow has {len(rules)} rules; {MAX_RULES} are the most")
    object.__setattr__(self, "allow", rules)
    object.__setattr__(self, "forward", _canonical_forward(self.forward))
    for port, _ in self.forwards:
      if f"127.0.0.1:{port}" in rules:
        raise PolicyError(f"NetworkPolicy: port {port} of 127.0.0.1 is both allowed and forwarded")
    for name in ("max_bytes", "max_connections"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PolicyError(f"NetworkPolicy.{name} must be a positive integer, not {value!r}")
    for name in ("idle_timeout", "total_timeout"):
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise PolicyError(f"NetworkPolicy.{name} must be a positive number, not {value!r}")

  @property
  def forwards(self) -> tuple[tuple[int, tuple[str, int]], ...]:
    """The items of `forward`: port in the sandbox, host and port outside."""
    assert isinstance(self.forward, tuple)
    return self.forward

  def allows(self, host: str, port: int) -> bool:
    """Whether a rule names this host, as `canonical_host` gives it, or its domain."""
    if f"{_bracketed(host)}:{port}" in self.allow:
      return True
    parents = _parents(host) if parse_address(host) is None else []
    return any(f"*.{parent}:{port}" in self.allow for parent in parents)

  def ports(self, host: str) -> tuple[int, ...]:
    """The ports at which a host may be reached; none if no rule names it."""
    candidates = {split_rule(rule)[1] for rule in self.allow}
    return tuple(sorted(port for port in candidates if self.allows(host, port)))

  def reachable(self, address: Address, port: int) -> bool:
    """Whether an allowed name may lead to this address: a public one, or one allowed by itself."""
    return is_public(address) or self.allows(str(unwrap(address)), port)


def canonical_host(host: str) -> str:
  """Brings a name or an address into the one form in which hosts are compared.

  Names become lower case, in IDNA's ASCII form, without the last dot. IPv4 addresses must have four
  decimal parts: what else some libraries take for one (0x7f.1, 2130706433, 127.1, 010.0.0.1) is
  refused rather than guessed. IPv6 addresses may be in brackets; one that stands for an IPv4
  address becomes it.

  Raises:
    PolicyError: it is neither a name nor an address.
  """
  if len(host) > 255:
    raise PolicyError(f"host name {host[:40]!r}... is too long")
  if host.startswith("[") and host.endswith("]"):
    host = host[1:-1]
    if ":" not in host:
      raise PolicyError(f"host [{host}] is no IPv6 address")
  if ":" in host:
    if "%" in host:
      raise PolicyError(f"host {host!r}: an address with a zone cannot be meant")
    try:
      return str(unwrap(ipaddress.IPv6Address(host)))
    except ValueError as error:
      raise PolicyError(f"host {host!r} is no address") from error
  try:
    name = host.encode("idna").decode().lower().removesuffix(".")
  except UnicodeError as error:
    raise PolicyError(f"host {host!r} is no name: {error}") from error
  labels = name.split(".")
  if _NUMBER.fullmatch(labels[-1]):
    try:
      return str(ipaddress.IPv4Address(name))
    except ValueError as error:
      raise PolicyError(f"host {host!r} is a number but no address of four decimals") from error
  if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
    raise PolicyError(f"host {host!r} is no name")
  return name


def unwrap(address: Address) -> Address:
  """The IPv4 address that an IPv6 address stands for (mapped, NAT64, 6to4); else itself."""
  if isinstance(address, ipaddress.IPv4Address):
    return address
  if address in _NAT64:
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
  return address.ipv4_mapped or address.sixtofour or address


def is_public(address: Address) -> bool:
  """Whether an address is one of the public internet, and no cloud provider's metadata service."""
  address = unwrap(address)
  if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_UNICAST:
    return False
  return address.is_global and not address.is_multicast and address not in _METADATA


def split_rule(rule: str) -> tuple[str, int]:
  """Splits a canonical rule, or a destination written alike, into host and port."""
  host, _, port = rule.rpartition(":")
  return host.strip("[]"), int(port)


def destination(host: str, port: int) -> str:
  """A host and a port as rules and logs write them."""
  return f"{_bracketed(host)}:{port}"


def _canonical_rule(rule: object) -> str:
  if not isinstance(rule, str):
    raise PolicyError(f"rule {rule!r} must be a text 'host:port'")
  host, colon, port = rule.rpartition(":")
  if not colon or not host:
    raise PolicyError(f"rule {rule!r} must be 'host:port'")
  if ":" in host and not host.startswith("["):
    raise PolicyError(f"rule {rule!r}: an IPv6 address needs brackets")
  number = _port(port, f"rule {rule!r}")
  wild = host.startswith("*.")
  try:
    name = canonical_host(host[2:] if wild else host)
  except PolicyError as error:
    raise PolicyError(f"rule {rule!r}: {error}") from error
  if wild and parse_address(name) is not None:
    raise PolicyError(f"rule {rule!r}: an address has no subdomains")
  return f"*.{name}:{number}" if wild else destination(name, number)


def _canonical_forward(
  forward: Mapping[int, tuple[str, int]] | Iterable[tuple[int, tuple[str, int]]],
) -> tuple[tuple[int, tuple[str, int]], ...]:
  items = forward.items() if isinstance(forward, Mapping) else forward
  result = {}
  for item in items:
    try:
      port, (host, target) = item
    except (TypeError, ValueError) as error:
      raise PolicyError(f"forward {item!r} must be port: (host, port)") from error
    what = f"forward {port!r}"
    if _port(port, what) in (PROXY_PORT, DNS_PORT):
      raise PolicyError(f"{what}: the proxy and the DNS server have this port")
    result[int(port)] = (canonical_host(host), _port(target, what))
  return tuple(sorted(result.items()))


def _port(port: object, what: str) -> int:
  text = str(port)
  if not re.fullmatch(r"[1-9][0-9]{0,4}", text) or int(text) > 65535:
    raise PolicyError(f"{what}: {port!r} is no port (1 to 65535)")
  return int(text)


def parse_address(host: str) -> Address | None:
  """The address that a canonical host is; None for a name."""
  try:
    return ipaddress.ip_address(host)
  except ValueError:
    return None


def _bracketed(host: str) -> str:
  return f"[{host}]" if ":" in host else host


def _parents(host: str) -> list[str]:
  labels = host.split(".")
  return [".".join(labels[i:]) for i in range(1, len(labels))]
