"""Tools of MCP servers, by the official library (`mcp`), as tools of the agent.

    with Servers({"git": Server(command=("mcp-server-git",))}) as servers:
      Executor([*tools, *servers.tools()])

Servers run beside the agent, on this host, in a thread with an event loop of its own. A tool is
named `server__tool`, and is of kind NETWORK unless its server says that it only reads.

What a server can do to the agent is bounded. The call in which one dies is "lost" and not made
again, as nobody knows what it did; the next call starts it once more, or connects again to one at a
URL. One that does not answer in time is a "timeout", and is ended where it does not say either what
tools it has. Results are cut, images are named and not shown, and a tool whose schema is broken or
reaches out of itself is left out, with a note.

Left out: prompts, resources, sampling, elicitation and roots; lists of tools that change while the
agent runs, since a request's tools stay as they are; OAuth.
"""

import asyncio
import collections
import concurrent.futures as cf
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jsonschema
import referencing
import referencing.jsonschema

from rome.agent.tools.base import NETWORK, READ, Tool, ToolResult

if TYPE_CHECKING:  # the library takes a second to import
  import anyio
  import mcp

MAX_TOOLS = 128  # of one server
_MAX_DESCRIPTION = 2000  # characters
_MAX_SCHEMA = 20_000
_MAX_RESULT = 30_000
_MAX_NAME = 64
_NO_NAME = re.compile(r"[^A-Za-z0-9_-]")
_CHECK_SECONDS = 2.0  # for a sign of life
_CLOSE_SECONDS = 8.0  # the library gives a server 2 s to end by itself and 2 s after SIGTERM
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Server:
  """One server, by a command (stdio) or a URL (streamable HTTP).

  Attributes:
    command: program and arguments.
    url: where it listens.
    env: of the command, beside HOME, PATH and the like; "$NAME" in a value is taken from the
      environment.
    headers: of requests to the URL; the same.
    timeout: seconds for a call.
    start_timeout: seconds until its tools are known.
  """

  command: tuple[str, ...] = ()
  url: str = ""
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)
  headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
  timeout: float = 60.0
  start_timeout: float = 30.0


class Servers:
  """The servers of an agent, from here to `close`. Starting waits until their tools are known.

  Args:
    servers: by name.
  Attributes:
    notes: lines for the user: servers that did not start, tools that are left out.
  """

  def __init__(self, servers: Mapping[str, Server]):
    self.notes: list[str] = []
    self._tools: list[Tool] = []
    self._closed = False
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
    self._connections = {name: _Connection(name, server) for name, server in servers.items()}
    if servers:
      self._thread.start()
      self._start()

  def __enter__(self) -> "Servers":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def tools(self) -> list[Tool]:
    """Of all servers, in the order of the settings."""
    return list(self._tools)

  def close(self) -> None:
    """Ends the servers; their processes are gone when it returns."""
    if self._closed or not self._thread.is_alive():
      return
    self._closed = True
    self._run(self._end()).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join()
    self._loop.close()

  async def _end(self) -> None:
    await asyncio.gather(*(one.stop() for one in self._connections.values()))
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    for call in calls:
      call.cancel()
    if calls:
      await asyncio.wait(calls, timeout=1)

  def _run(self, work: Coroutine[Any, Any, _T]) -> cf.Future[_T]:
    return asyncio.run_coroutine_threadsafe(work, self._loop)

  def _start(self) -> None:
    """Starts all at once and takes their tools in order."""
    import mcp  # noqa: F401 - here rather than in the loop, where it would hold up time-outs

    starts = {name: self._run(one.start()) for name, one in self._connections.items()}
    taken: set[str] = set()
    for name, start in starts.items():
      if why := start.result():
        self.notes.append(f"MCP server {name}: {why}; its tools are off")
      for offered in self._connections[name].offered:
        found = self._tool(name, offered, taken)
        if isinstance(found, str):
          self.notes.append(f"MCP server {name}: tool {offered.name[:80]!r} is off: {found}")
        else:
          taken.add(found.name)
          self._tools.append(found)

  def _tool(self, server: str, offered: "mcp.Tool", taken: set[str]) -> Tool | str:
    """The tool, or why there is none."""
    name = _NO_NAME.sub("_", f"{server}__{offered.name}")
    if len(name) > _MAX_NAME:
      return f"its name {name[:80]!r} has more than {_MAX_NAME} characters"
    if name in taken:
      return f"there is one named {name} already"
    if why := check_schema(offered.input_schema):
      return f"its schema cannot be used, {why}"
    reads = bool(offered.annotations and offered.annotations.read_only_hint)
    return Tool(
      name,
      (offered.description or "")[:_MAX_DESCRIPTION],
      offered.input_schema,
      functools.partial(self._call, server, offered.name),
      READ if reads else NETWORK,
      parallel=reads,
    )

  def _call(self, server: str, tool: str, arguments: dict[str, Any]) -> ToolResult:
    connection = self._connections[server]
    limits = connection.server.timeout + connection.server.start_timeout + 3 * _CLOSE_SECONDS
    if not self._closed:
      with contextlib.suppress(cf.CancelledError, cf.TimeoutError):
        return self._run(connection.call(tool, arguments)).result(limits)
    return ToolResult(f"error: the MCP server {server} has been closed", "lost")


class _Connection:
  """One server and its life; all methods run in the loop."""

  def __init__(self, name: str, server: Server):
    self.name, self.server = name, server
    self.offered: list[mcp.Tool] = []
    self._client: mcp.Client | None = None  # None where it is not there
    self._task: asyncio.Task[None] | None = None
    self._stop = asyncio.Event()
    self._scope: anyio.CancelScope | None = None
    self._restarts = 1.0 if server.command else math.inf  # that are left
    self._lock = asyncio.Lock()  # of beginning and end

  async def start(self) -> str:
    """Starts the server; returns "" or why it is not there."""
    stderr = _Tail()
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    self._task = asyncio.create_task(self._live(ready, stderr))
    try:
      await asyncio.wait_for(asyncio.shield(ready), self.server.start_timeout)
      return ""
    except TimeoutError:
      why = f"it did not start within {self.server.start_timeout:g} s"
    except Exception as error:  # whatever the library and the system have
      why = f"it did not start ({_words(error)})"
    await self.stop()
    said = stderr.text()
    return f"{why}; its last words: {said}" if said else why

  async def stop(self) -> None:
    """Ends the server and waits until it has ended."""
    if self._task is None:
      return
    if self._client:
      self._client = None
      self._stop.set()
      await asyncio.wait([self._task], timeout=_CHECK_SECONDS)
    if self._scope:
      self._scope.cancel()
    await asyncio.wait([self._task], timeout=_CLOSE_SECONDS)

  async def call(self, tool: str, arguments: dict[str, Any]) -> ToolResult:
    """One call; whatever happens is a result."""
    import mcp
    from mcp.types import CONNECTION_CLOSED

    why = await self._revive()
    client = self._client
    if client is None:
      return ToolResult(f"error: the MCP server {self.name} is not there{why}", "lost")
    calling = asyncio.ensure_future(client.call_tool(tool, arguments))
    assert self._task
    await asyncio.wait(
      [calling, self._task], timeout=self.server.timeout, return_when=asyncio.FIRST_COMPLETED
    )
    if not calling.done():
      calling.cancel()
      if self._task.done():
        return await self._lost(client)
      return await self._late(client)
    try:
      return _result(await calling)
    except mcp.MCPError as error:
      if error.code == CONNECTION_CLOSED:
        return await self._lost(client)
      return ToolResult(f"error: {_words(error)}", "error")
    except Exception as error:  # an answer that breaks the protocol
      text = f"error: the MCP server {self.name} answers nonsense: {_words(error)}"
      return ToolResult(text, "error")

  async def _late(self, client: "mcp.Client") -> ToolResult:
    """A call that took too long: the server stays where it still says what tools it has."""
    text = f"error: the MCP server {self.name} did not answer within {self.server.timeout:g} s"
    try:
      await asyncio.wait_for(client.list_tools(cache_mode="bypass"), _CHECK_SECONDS)
      return ToolResult(text, "timeout")
    except Exception:  # no sign of life
      return ToolResult(f"{text}; {await self._give_up(client)}", "timeout")

  async def _lost(self, client: "mcp.Client") -> ToolResult:
    text = f"error: the MCP server {self.name} died during the call"
    return ToolResult(f"{text}; {await self._give_up(client)}", "lost")

  async def _give_up(self, dead: "mcp.Client") -> str:
    """Ends it; says whether there is hope."""
    async with self._lock:
      if self._client is dead:
        await self.stop()
    if self._restarts:
      return "the next call starts it again; call again if that does no harm"
    return "it is not started again, do without it"

  async def _revive(self) -> str:
    """Starts it again if it is gone and that may be; returns "" or why it cannot be."""
    async with self._lock:
      if self._client or not self._restarts:
        return ""
      self._restarts -= 1
      why = await self.start()
    return f": {why}" if why else ""

  async def _live(self, ready: asyncio.Future[None], stderr: "_Tail") -> None:
    """The life of one process or session; the library wants begin and end in one task."""
    import anyio
    import mcp

    self._stop = stop = asyncio.Event()
    with anyio.CancelScope() as self._scope:
      try:
        async with contextlib.AsyncExitStack() as stack:
          transport = await _transport(self.server, stderr, stack)
          client = await stack.enter_async_context(mcp.Client(transport, cache=None))
          self.offered = await _list_tools(client)
          self._client = client
          ready.set_result(None)
          await stop.wait()
      except Exception as error:
        if not ready.done():
          ready.set_exception(error)
      finally:
        stderr.close()


async def _transport(server: Server, stderr: "_Tail", stack: contextlib.AsyncExitStack) -> Any:
  """What the library's client talks through."""
  if server.command:
    from mcp import StdioServerParameters
    from mcp.client.stdio import stdio_client

    program, *arguments = server.command
    env = {key: os.path.expandvars(value) for key, value in server.env.items()}
    parameters = StdioServerParameters(command=program, args=arguments, env=env)
    return stdio_client(parameters, errlog=stderr.file)
  import httpx2
  from mcp.client.streamable_http import streamable_http_client

  headers = {key: os.path.expandvars(value) for key, value in server.headers.items()}
  timeout = httpx2.Timeout(server.start_timeout, read=None)  # calls have a time-out of their own
  client = await stack.enter_async_context(httpx2.AsyncClient(headers=headers, timeout=timeout))
  return streamable_http_client(server.url, http_client=client)


async def _list_tools(client: "mcp.Client") -> "list[mcp.Tool]":
  """The first MAX_TOOLS tools."""
  tools: list[mcp.Tool] = []
  cursor = None
  for _ in range(MAX_TOOLS):
    page = await client.list_tools(cursor=cursor)
    tools += page.tools
    cursor = page.next_cursor
    if not cursor or len(tools) >= MAX_TOOLS:
      break
  return tools[:MAX_TOOLS]


def check_schema(schema: Any) -> str:
  """Why arguments cannot be checked against a schema, "" where they can."""
  try:
    if len(json.dumps(schema)) > _MAX_SCHEMA:
      return f"it has more than {_MAX_SCHEMA} characters"
    jsonschema.Draft202012Validator.check_schema(schema)
    if schema.get("type") != "object":
      return "it is of no object"
    resource = referencing.jsonschema.DRAFT202012.create_resource(schema)
    registry: referencing.Registry[Any] = referencing.Registry().with_resource("", resource)
    for reference in _references(schema):
      if not reference.startswith("#"):  # the validator would go and fetch it
        return f"it refers to {reference[:80]!r}, outside of itself"
      registry.resolver("").lookup(reference)
    next(jsonschema.Draft202012Validator(schema).iter_errors({}), None)
  except jsonschema.SchemaError as error:
    return error.message[:200]
  except Exception as error:  # references to nothing, or in a circle
    return _words(error)
  return ""


def _references(schema: Any) -> Iterator[str]:
  if isinstance(schema, dict):
    for key, value in schema.items():
      if key in ("$ref", "$dynamicRef") and isinstance(value, str):
        yield value
      elif key == "$id" and isinstance(value, str):
        yield value  # by which references would mean something else
      else:
        yield from _references(value)
  elif isinstance(schema, list):
    for value in schema:
      yield from _references(value)


def _result(result: "mcp.types.CallToolResult") -> ToolResult:
  """What the model reads of a result."""
  parts = [_block(block) for block in result.content]
  if not parts and result.structured_content is not None:
    parts = [json.dumps(result.structured_content, ensure_ascii=False)]
  text = "\n".join(parts)
  facts = {}
  if len(text) > _MAX_RESULT:
    half, more = _MAX_RESULT // 2, len(text) - _MAX_RESULT
    text = f"{text[:half]}\n[... {more} characters are left out ...]\n{text[-half:]}"
    facts = {"truncated": True}
  return ToolResult(text, "error" if result.is_error else "ok", facts)


def _block(block: Any) -> str:
  """A part of a result as text."""
  if block.type == "text":
    return block.text
  if block.type in ("image", "audio"):
    return f"[{block.type} {block.mime_type}, {len(block.data) * 3 // 4} bytes, not shown]"
  if block.type == "resource":
    text = getattr(block.resource, "text", None)
    return text if text is not None else f"[resource {block.resource.uri}, not shown]"
  return f"[{block.type} {getattr(block, 'uri', '')}]"


def _words(error: BaseException) -> str:
  """An error in one line; of a group, its first."""
  while isinstance(error, BaseExceptionGroup):
    error = error.exceptions[0]
  return " ".join(str(error).split())[:300] or type(error).__name__


class _Tail:
  """The last words on a stream that a process writes to, however much it writes."""

  def __init__(self) -> None:
    reading, writing = os.pipe()
    self.file = os.fdopen(writing, "w")
    self._kept: collections.deque[int] = collections.deque(maxlen=500)
    self._thread = threading.Thread(target=self._read, args=(reading,), daemon=True)
    self._thread.start()

  def _read(self, reading: int) -> None:
    with os.fdopen(reading, "rb", buffering=0) as file:
      while piece := file.read(1 << 16):
        self._kept.extend(piece[-500:])

  def close(self) -> None:
    """Of this process's end; what the other one holds stays open."""
    self.file.close()

  def text(self) -> str:
    """Once it is closed."""
    self._thread.join(0.5)
    return " ".join(bytes(self._kept).decode("utf-8", errors="replace").split())
