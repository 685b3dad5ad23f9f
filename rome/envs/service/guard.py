"""What every request passes before any handler sees it, and what bounds slow clients.

Pure ASGI, no base class that buffers. In order: is there room, who calls, how often, may a browser
send this. Then the body is counted while it streams, each of its pieces has a deadline, and so has
each piece of the answer: a client that neither sends nor reads is cut off.
"""

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rome.envs.service.auth import Tenant, Tokens
from rome.envs.service.errors import ApiError, ClientGone, to_api_error
from rome.envs.service.limits import Rates
from rome.envs.service.metrics import Metrics

_log = logging.getLogger("rome.envs.service")
_OPEN = {"/health", "/ready", "/openapi.json"}  # nothing in them is anybody's secret
_LOCAL = {"127.0.0.1", "localhost", "[::1]"}
_HEADERS = [
  (b"cache-control", b"no-store"),
  (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'"),
  (b"referrer-policy", b"no-referrer"),
  (b"x-content-type-options", b"nosniff"),
  (b"x-frame-options", b"DENY"),
]


class Guard:
  """ASGI middleware around the whole app."""

  def __init__(
    self,
    app: ASGIApp,
    tokens: Tokens,
    rates: Rates,
    metrics: Metrics,
    *,
    max_requests: int,
    max_body: int,
    max_upload: int,
    slow: float,
    respond: Callable[[Exception], Response] = lambda error: to_api_error(error).response(),
  ):
    """Wraps the app.

    Args:
      app: the app.
      tokens: who may call.
      rates: how often.
      metrics: where requests are counted.
      max_requests: requests at a time; one tenant may have at most half of them.
      max_body: bytes of a body of JSON.
      max_upload: bytes of a streamed file.
      slow: seconds that one piece of a body or of an answer may take.
      respond: the answer for an exception, `ApiError` among them.
    """
    self._app, self._tokens, self._rates, self._metrics = app, tokens, rates, metrics
    self._max_requests, self._max_body, self._max_upload = max_requests, max_body, max_upload
    self._slow, self._respond = slow, respond
    self._active = 0
    self._of_tenant: collections.Counter[str] = collections.Counter()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
      await self._app(scope, receive, send)
    elif scope["type"] == "http":
      await self._request(scope, receive, send)
    else:  # there are no websockets here
      await receive()
      await send({"type": "websocket.close", "code": 1008})

  async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
    start, answer = time.perf_counter(), _Answer(send, self._slow)
    self._active += 1
    try:
      tenant = self._admit(scope)
      scope.setdefault("state", {})["tenant"] = tenant
      with self._room_for(tenant):
        await self._app(scope, self._counted(scope, receive, tenant), answer.send)
    except ClientGone:
      answer.status = answer.status or 499
    except Exception as error:
      if answer.status:  # what is left of the answer cannot come: the server hangs up
        _log.warning("%s %s broke off: %r", scope["method"], scope["path"], error)
      else:
        await self._respond(error)(scope, receive, answer.send)
    finally:
      self._active -= 1
      route = getattr(scope.get("route"), "path", "none")
      seconds = time.perf_counter() - start
      self._metrics.request(scope["method"], route, answer.status, seconds)

  def _admit(self, scope: Scope) -> Tenant | None:
    """The tenant of a request, None for the open paths. Raises ApiError where it may not pass."""
    if self._active > self._max_requests:
      raise ApiError(
        503,
        "out_of_capacity",
        f"{self._max_requests} requests are being served",
        "try again later; nothing was done",
        retry_after=1,
      )
    headers = {key.lower(): value.decode("latin-1") for key, value in scope["headers"]}
    if not self._tokens:
      _refuse_browsers(headers)
    if scope["path"] in _OPEN:
      return None
    page = scope["method"] in ("GET", "HEAD") and scope["path"] == "/"
    tenant = self._tokens.tenant(headers.get(b"authorization"), basic=page)
    if tenant is None:
      raise ApiError(
        401,
        "unauthorized",
        "no valid token",
        "send the header Authorization: Bearer TOKEN",
        challenge="Basic" if page else "Bearer",
      )
    self._rates.request(tenant)
    return tenant

  @contextlib.contextmanager
  def _room_for(self, tenant: Tenant | None) -> Iterator[None]:
    """Counts a tenant's requests: those that wait must not take all the room. Raises ApiError."""
    name = tenant.name if tenant and self._tokens else ""
    if name and self._of_tenant[name] >= max(1, self._max_requests // 2):
      raise ApiError(
        429,
        "too_many_requests",
        f"tenant {name} has {self._of_tenant[name]} requests that are not answered yet",
        "wait for some of them; nothing was done",
        retry_after=1,
      )
    self._of_tenant[name] += 1
    try:
      yield
    finally:
      self._of_tenant[name] -= 1

  def _counted(self, scope: Scope, receive: Receive, tenant: Tenant | None) -> Receive:
    """`receive` with a bound on the bytes, a deadline for each piece, and the tenant's rate."""
    streamed = scope["method"] == "PUT"
    most = self._max_upload if streamed else self._max_body
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
      raise _too_large(most)
    seen, ended = 0, False

    async def counted() -> Message:
      nonlocal seen, ended
      if ended:  # only the news that the client hung up can come now; handlers have deadlines
        return await receive()
      try:
        async with asyncio.timeout(self._slow):
          message = await receive()
      except TimeoutError as error:
        raise ApiError(
          408, "too_slow", f"no byte of the body came for {self._slow:g} s", "send it faster"
        ) from error
      if message["type"] == "http.disconnect":
        ended = True
        return message
      size = len(message.get("body", b""))
      seen, ended = seen + size, not message.get("more_body", False)
      if seen > most:
        raise _too_large(most)
      if streamed and tenant and size:
        await asyncio.sleep(self._rates.upload(tenant, size))
      return message

    return counted


class _Answer:
  """`send` with a deadline, the fixed headers, and the status for the metrics."""

  def __init__(self, send: Send, slow: float):
    self._send, self._slow = send, slow
    self.status = 0

  async def send(self, message: Message) -> None:
    if message["type"] == "http.response.start":
      self.status = message["status"]
      named = {key.lower() for key, _ in message.get("headers", ())}
      fixed: list[Any] = [item for item in _HEADERS if item[0] not in named]
      message = {**message, "headers": [*message.get("headers", ()), *fixed]}
    try:
      async with asyncio.timeout(self._slow):
        await self._send(message)
    except TimeoutError as error:
      raise ClientGone from error


def _refuse_browsers(headers: dict[bytes, str]) -> None:
  """Without tokens, a page of a stranger in this machine's browser must not reach the service."""
  host = headers.get(b"host", "")
  name = host if host.endswith("]") else host.rpartition(":")[0] or host
  origin = headers.get(b"origin")
  if name not in _LOCAL or (origin is not None and origin != f"http://{host}"):
    raise ApiError(
      403,
      "foreign_origin",
      "without tokens the service answers only to its own address on this machine",
      "call it as 127.0.0.1 or localhost, or give it tokens",
    )


def _too_large(most: int) -> ApiError:
  return ApiError(413, "too_large", f"the body is longer than {most} bytes", "send less at a time")
