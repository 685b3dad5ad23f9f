"""The HTTP/1.1 proxy of a sandbox: forward requests (absolute URLs) and CONNECT.

Messages are parsed and written anew by h11, one upstream connection a request, so that no two
parsers can disagree about where a request ends. What is ambiguous is refused: both framings at
once, a Host header that differs from the URL, user names in it.

Left out: caching, authentication, upgrades of plain HTTP (web sockets use CONNECT), trailers.
"""

import asyncio
from collections.abc import Iterable

import h11

from rome.envs.network.attempts import Entry
from rome.envs.network.gate import CHUNK, Gate, Meter, Refused, Stream, cancel, closing, named

HEAD_TIMEOUT = 15.0  # seconds for a whole request head, and between requests
MAX_HEAD = 32 << 10  # bytes
_HOP_BY_HOP = frozenset(
  b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
  b"transfer-encoding upgrade expect host".split()
)
_Headers = list[tuple[bytes, bytes]]


async def serve(gate: Gate, inside: Stream) -> None:
  """Serves one connection from the sandbox until either end closes it."""
  client = _Client(inside)
  while True:
    try:
      async with asyncio.timeout(HEAD_TIMEOUT):
        request = await client.event()
    except TimeoutError:
      return await client.refuse(Refused(408, "the request's head did not come in time"))
    except h11.RemoteProtocolError as error:
      refusal = Refused(error.error_status_hint or 400, f"malformed request: {error}")
      _refused(gate, "?", refusal)
      return await client.refuse(refusal)
    if not isinstance(request, h11.Request):
      return
    if not await _handle(gate, client, request):
      return
    client.http.start_next_cycle()


class _Client:
  """The sandbox's end of a connection."""

  def __init__(self, stream: Stream):
    self.stream = stream
    self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    self.head_only = False

  async def event(self) -> object:
    event = await _event(self.http, self.stream[0])
    if isinstance(event, h11.Request):
      self.head_only = event.method == b"HEAD"
    return event

  async def send(self, event: h11.Event) -> None:
    self.stream[1].write(self.http.send(event) or b"")
    await self.stream[1].drain()

  async def refuse(self, refusal: Refused) -> None:
    """Answers with the reason, where nothing has been answered yet, and says to close."""
    if self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
      return
    text = f"rome: refused: {refusal}\n".encode(errors="replace")
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(text)))]
    headers += [("Connection", "close")]
    await self.send(h11.Response(status_code=refusal.status, headers=headers))
    if not self.head_only:
      await self.send(h11.Data(data=text))
    await self.send(h11.EndOfMessage())
    self.stream[1].write_eof()
    try:  # what is still coming is read, or the kernel would reset the connection, answer and all
      async with asyncio.timeout(1):
        for _ in range(16):
          if not await self.stream[0].read(CHUNK):
            return
    except TimeoutError:
      pass


def _refused(gate: Gate, target: str, refusal: Refused, kind: str = "http") -> None:
  gate.log.end(gate.log.begin(kind, target, False, str(refusal)))


async def _handle(gate: Gate, client: _Client, request: h11.Request) -> bool:
  """Serves one request. Returns whether another may follow on the connection."""
  kind = "connect" if request.method == b"CONNECT" else "http"
  target = request.target.decode("ascii", "backslashreplace")
  try:
    host, port, path = _split(request)
    target = named(host, port)
    _check_head(request, host, port)
    name = gate.judge(host, port)
  except Refused as refusal:
    _refused(gate, target, refusal, kind)
    await client.refuse(refusal)
    return False
  entry = gate.log.begin(kind, target, True)
  meter = Meter(gate, entry)
  try:
    outside = await gate.connect(name, port)
    async with closing(outside[1]):
      if kind == "connect":
        await meter.watch(_tunnel(client, outside, meter))
        return False
      await meter.watch(_forward(client, outside, request, path, meter))
    return client.http.our_state is h11.DONE and client.http.their_state is h11.DONE
  except Refused as refusal:
    _mark(entry, refusal)
    await client.refuse(refusal)
  except h11.RemoteProtocolError as error:
    entry.reason = f"malformed message: {error}"
    await client.refuse(Refused(502, entry.reason))
  finally:
    gate.log.end(entry)
  return False


def _mark(entry: Entry, refusal: Refused) -> None:
  """What the policy refused is refused; what merely failed stays allowed, with its reason."""
  entry.allowed = refusal.status >= 500
  entry.reason = str(refusal)


def _split(request: h11.Request) -> tuple[str, int, bytes]:
  """Host, port and path of a request's target. Raises Refused."""
  target = request.target
  if request.method == b"CONNECT":
    authority, path, default = target, b"", None
  else:
    if target[:7].lower() != b"http://":
      raise Refused(400, "the proxy takes absolute http:// URLs and CONNECT")
    rest = target[7:]
    end = min((at for at in map(rest.find, (b"/", b"?", b"#")) if at >= 0), default=len(rest))
    authority, path, default = rest[:end], rest[end:].split(b"#")[0], 80
    path = path if path.startswith(b"/") else b"/" + path
  return *_split_authority(authority, default), path


def _split_authority(authority: bytes, default: int | None) -> tuple[str, int]:
  text = authority.decode("ascii", "backslashreplace")
  host, colon, port = text.rpartition(":")
  if not colon or "]" in port:
    host, port = text, "" if default is None else str(default)
  if not host or not port.isascii() or not port.isdecimal() or len(port) > 5:
    raise Refused(400, f"{text!r} is no host and port")
  if not 0 < int(port) < 65536 or "@" in host or (":" in host and not host.startswith("[")):
    raise Refused(400, f"{text!r} is no host and port")
  return host, int(port)


def _check_head(request: h11.Request, host: str, port: int) -> None:
  names = [name for name, _ in request.headers]
  if b"transfer-encoding" in names and b"content-length" in names:
    raise Refused(400, "both Transfer-Encoding and Content-Length")
  for name, value in request.headers:
    if name == b"host":
      default = port if request.method == b"CONNECT" else 80
      if named(*_split_authority(value, default)) != named(host, port):
        raise Refused(400, f"the Host header says {value.decode('ascii', 'replace')}")


async def _tunnel(client: _Client, outside: Stream, meter: Meter) -> None:
  while not isinstance(event := await client.event(), h11.EndOfMessage):
    if not isinstance(event, h11.Data):
      break
  await client.send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
  early, _ = client.http.trailing_data
  await meter.splice(client.stream, outside, early)


async def _forward(
  client: _Client, outside: Stream, request: h11.Request, path: bytes, meter: Meter
) -> None:
  upstream = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
  headers: _Headers = [(b"Host", _authority(request)), *_end_to_end(request.headers)]
  if any(name == b"transfer-encoding" for name, _ in request.headers):
    headers.append((b"Transfer-Encoding", b"chunked"))
  headers.append((b"Connection", b"close"))

  async def send(event: h11.Event) -> None:
    data = upstream.send(event) or b""
    meter.sent(len(data))
    outside[1].write(data)
    await outside[1].drain()

  async def upload() -> None:
    if client.http.they_are_waiting_for_100_continue:
      await client.send(h11.InformationalResponse(status_code=100, headers=[]))
    while isinstance(event := await client.event(), h11.Data):
      await send(h11.Data(data=event.data))
    if isinstance(event, h11.EndOfMessage):
      await send(h11.EndOfMessage())

  await send(h11.Request(method=request.method, target=path, headers=headers))
  up = asyncio.create_task(upload())
  down = asyncio.create_task(_download(client, upstream, outside[0], meter))
  try:
    await asyncio.wait([up, down], return_when=asyncio.FIRST_COMPLETED)
    if up.done():
      up.result()
    await down  # a server may answer before it has read all; then the rest is not sent
  finally:
    await cancel([up, down])


async def _download(
  client: _Client, upstream: h11.Connection, reader: asyncio.StreamReader, meter: Meter
) -> None:
  while True:
    event = await _event(upstream, reader, meter)
    if isinstance(event, h11.Response):
      headers = _end_to_end(event.headers)
      await client.send(
        h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
      )
    elif isinstance(event, h11.Data):
      await client.send(h11.Data(data=event.data))
    elif isinstance(event, h11.EndOfMessage):
      return await client.send(h11.EndOfMessage())
    elif not isinstance(event, h11.InformationalResponse):
      raise h11.RemoteProtocolError("the server hung up")


async def _event(
  http: h11.Connection, reader: asyncio.StreamReader, meter: Meter | None = None
) -> object:
  while (event := http.next_event()) is h11.NEED_DATA:
    data = await reader.read(CHUNK)
    if meter:
      meter.received(len(data))
    http.receive_data(data)
  return event


def _authority(request: h11.Request) -> bytes:
  """The Host for the server: as in the URL, which the header, if there is one, agrees with."""
  rest = request.target[7:]
  end = min((at for at in map(rest.find, (b"/", b"?", b"#")) if at >= 0), default=len(rest))
  return rest[:end]


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> _Headers:
  """The headers that are not for the next hop alone."""
  listed = list(headers)
  values = b",".join(value for name, value in listed if name == b"connection")
  drop = _HOP_BY_HOP | {token.strip().lower() for token in values.split(b",")}
  drop -= {b"content-length"}  # it frames the body, whatever the sender says
  if any(name == b"transfer-encoding" for name, _ in listed):
    drop |= {b"content-length"}  # the length of a chunked body is not what it says
  return [(name, value) for name, value in listed if name not in drop]
