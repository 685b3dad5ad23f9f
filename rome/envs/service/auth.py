"""Who calls: bearer tokens, each with a tenant's name and quotas. Only hashes are kept.

Tokens are long random strings, so a plain SHA-256 is enough: there is nothing to guess. The file
that names them is TOML, a table a tenant:

    [alice]
    sha256 = "9f86d0..."      # printf %s "$TOKEN" | sha256sum
    sandboxes = 16            # any of the quotas below; what is left out has its default
"""

import base64
import binascii
import dataclasses
import hashlib
import hmac
import os
import pathlib
import re
import tomllib
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from rome.envs.common import SandboxError

TOKEN_VARIABLE = "ROME_SANDBOX_TOKEN"
LEAST_TOKEN = 16  # characters
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


class TokenError(SandboxError):
  """The tokens given to the service cannot be used; the message says which and why."""


@dataclasses.dataclass(frozen=True)
class Quotas:
  """What one tenant may use at a time.

  Attributes:
    sandboxes: live sandboxes, those of environments and those still waiting too.
    cpus: sum of their `Limits.cpus`.
    memory_mb: sum of their `Limits.memory_mb`.
    calls: calls that work at the same time; more wait.
    requests_per_second: of any kind, in the long run; bursts of twice as many pass.
    upload_bytes_per_second: faster uploads are slowed down.
  """

  sandboxes: int = 64
  cpus: float = 64.0
  memory_mb: int = 65536
  calls: int = 64
  requests_per_second: float = 1000.0
  upload_bytes_per_second: float = float(1 << 30)

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      kind = int if field.type is int else int | float
      if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
        raise TokenError(f"quota {field.name} must be a number above 0, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Tenant:
  """One who may call."""

  name: str
  quotas: Quotas = Quotas()


class Tokens:
  """The tenants by their tokens' hashes. Empty: nobody needs a token, all are the one tenant."""

  def __init__(self, tenants: Sequence[tuple[bytes, Tenant]] = ()):
    self._tenants = list(tenants)
    self._anonymous = Tenant("local")

  def __bool__(self) -> bool:
    return bool(self._tenants)

  def tenant(self, authorization: str | None, *, basic: bool = False) -> Tenant | None:
    """The tenant that a request's Authorization header names; None for nobody.

    Args:
      authorization: the header's value.
      basic: whether the token may also come as the password of HTTP basic authentication, which is
        what a browser can send. Only for pages that are read: a browser sends it unasked.
    """
    if not self._tenants:
      return self._anonymous
    token = _token(authorization or "", basic)
    if not token:
      return None
    digest, found = hashlib.sha256(token).digest(), None
    for known, tenant in self._tenants:  # all of them: the time tells nothing
      if hmac.compare_digest(known, digest):
        found = tenant
    return found


def load_tokens(
  path: str | os.PathLike[str] | None = None, environ: MutableMapping[str, str] | None = None
) -> Tokens:
  """Reads the tokens' file, or else the one token in the environment, or else none.

  Args:
    path: the file. Its token's tenants are its tables' names.
    environ: where `ROME_SANDBOX_TOKEN` may stand; it is removed, so that no child inherits it.

  Raises:
    TokenError: the file cannot be read or holds something wrong, or the token is too short.
  """
  environ = os.environ if environ is None else environ
  token = environ.pop(TOKEN_VARIABLE, None)
  if path is not None:
    return Tokens(_read(pathlib.Path(path)))
  if token is None:
    return Tokens()
  if len(token) < LEAST_TOKEN:
    raise TokenError(f"{TOKEN_VARIABLE} is shorter than {LEAST_TOKEN} characters: make it longer")
  return Tokens([(hashlib.sha256(token.encode()).digest(), Tenant("default"))])


def _read(path: pathlib.Path) -> list[tuple[bytes, Tenant]]:
  try:
    tables = tomllib.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise TokenError(f"tokens file {path}: {error}") from error
  if not tables:
    raise TokenError(f"tokens file {path} names nobody: add a table [name] with sha256")
  found = [_entry(path, name, table) for name, table in tables.items()]
  if len({digest for digest, _ in found}) < len(found):
    raise TokenError(f"tokens file {path}: two tenants have the same token")
  return found


def _entry(path: pathlib.Path, name: str, table: Any) -> tuple[bytes, Tenant]:
  if not _NAME.fullmatch(name) or not isinstance(table, Mapping):
    raise TokenError(f"tokens file {path}: {name!r} must be a table named a-z, 0-9, _ and -")
  quotas = dict(table)
  digest = quotas.pop("sha256", "")
  if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
    raise TokenError(f"tokens file {path}: [{name}] needs sha256 = 64 hexadecimal digits")
  unknown = sorted(set(quotas) - {field.name for field in dataclasses.fields(Quotas)})
  if unknown:
    raise TokenError(f"tokens file {path}: [{name}] has the unknown key {unknown[0]!r}")
  try:
    return bytes.fromhex(digest), Tenant(name, Quotas(**quotas))
  except TokenError as error:
    raise TokenError(f"tokens file {path}: [{name}]: {error}") from error


def _token(header: str, basic: bool) -> bytes:
  """The token in an Authorization header, b"" for none."""
  scheme, _, value = header.strip().partition(" ")
  if scheme.lower() == "bearer":
    return value.strip().encode("utf-8", "surrogateescape")
  if basic and scheme.lower() == "basic":
    try:
      return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
      return b""
  return b""
