"""MCP: real servers over stdio and HTTP, and one that dies, hangs, floods, breaks the protocol."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from rome.agent.executor import Executor
from rome.agent.mcp import Server, Servers, check_schema
from rome.agent.model import Call
from rome.agent.tools.base import NETWORK, READ

BAD_SERVER = (sys.executable, str(pathlib.Path(__file__).with_name("mcp_server.py")))
BIN = pathlib.Path(sys.executable).parent


def run(servers, name, arguments=None):
  executor = Executor(servers.tools())
  try:
    next(executor.run([Call("", name, json.dumps(arguments or {}))]))
  except StopIteration as end:
    return end.value[0]


@pytest.mark.slow
def test_reference_servers(tmp_path):
  """mcp-server-git and mcp-server-time, as their makers publish them."""
  git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
  subprocess.run([*git, "init", "-qb", "main", tmp_path], check=True)
  subprocess.run([*git, "commit", "-qm", "the first", "--allow-empty"], cwd=tmp_path, check=True)
  commands = {name: Server((str(BIN / f"mcp-server-{name}"),)) for name in ("git", "time")}
  with Servers(commands) as servers:
    assert servers.notes == []
    kinds = {tool.name: tool.kind for tool in servers.tools()}
    assert kinds["git__git_log"] == READ and kinds["git__git_commit"] == NETWORK
    log = run(servers, "git__git_log", {"repo_path": str(tmp_path)})
    assert log.outcome == "ok" and "the first" in log.text
    assert run(servers, "git__git_log", {"repo_path": "/none"}).outcome == "error"
    assert run(servers, "git__git_log").outcome == "invalid_arguments"
    asked = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    assert "21:00" in run(servers, "time__convert_time", asked).text


HTTP = """
import os, sys, time
from mcp.server.mcpserver import MCPServer
server = MCPServer("x")
@server.tool()
def add(a: int, b: int) -> int:
  return a + b
@server.tool()
async def die() -> str:
  os._exit(3)
@server.tool()
async def hang() -> str:
  time.sleep(1000)
server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
"""


def listening(port):
  with socket.socket() as one:
    return one.connect_ex(("127.0.0.1", port)) == 0


def serve(port):
  process = subprocess.Popen([sys.executable, "-c", HTTP, str(port)], stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 60
  while not listening(port):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.05)
  return process


@pytest.fixture
def port():
  with socket.socket() as one:
    one.bind(("127.0.0.1", 0))
    return one.getsockname()[1]


@pytest.mark.slow
def test_http(port):
  processes = [serve(port)]
  try:
    url = f"http://127.0.0.1:{port}/mcp"
    with Servers({"web": Server(url=url, timeout=2), "gone": Server(url=url + "x")}) as servers:
      (note,) = servers.notes
      assert note.startswith("MCP server gone: it did not start")
      result = run(servers, "web__add", {"a": 2, "b": 3})
      assert (result.outcome, result.text) == ("ok", "5")
      assert run(servers, "web__die").outcome in ("lost", "error")
      processes[0].wait(10)
      processes.append(serve(port))
      assert run(servers, "web__add", {"a": 2, "b": 3}).text == "5"
      assert run(servers, "web__hang").outcome == "timeout"
  finally:
    for process in processes:
      process.kill()
      process.wait()


def test_results_of_every_kind():
  with Servers({"x": Server(BAD_SERVER)}) as servers:
    kinds = {tool.name: tool.kind for tool in servers.tools()}
    assert kinds["x__echo"] == READ and kinds["x__die"] == NETWORK
    assert run(servers, "x__echo", {"text": "é\x00"}).text == '{"text": "\\u00e9\\u0000"}'
    assert run(servers, "x__echo", {"text": 3}).outcome == "invalid_arguments"
    assert run(servers, "x__image").text == "[image image/png, 300 bytes, not shown]"
    big = run(servers, "x__big")
    assert len(big.text) < 31_000 and "4970000 characters are left out" in big.text
    assert big.facts == {"truncated": True}
    fails = run(servers, "x__fails")
    assert (fails.outcome, fails.text) == ("error", "no such thing")
    nonsense = run(servers, "x__nonsense")
    assert nonsense.outcome == "error" and "answers nonsense" in nonsense.text
    assert run(servers, "x__garbage").text == "still here"
    tool = servers.tools()[0]
  assert tool.run({}).outcome == "lost"  # after the end


def test_a_server_that_dies_is_started_once_more(tmp_path):
  log = tmp_path / "log"
  with Servers({"x": Server((*BAD_SERVER, "count", str(log)))}) as servers:
    lost = run(servers, "x__die")
    assert (
      lost.outcome == "lost" and "died during the call; the next call starts it again" in lost.text
    )
    assert run(servers, "x__echo").outcome == "ok"
    lost = run(servers, "x__die")
    assert lost.outcome == "lost" and "not started again" in lost.text
    assert run(servers, "x__echo").outcome == "lost"
  assert len(log.read_text().split()) == 2


@pytest.mark.slow
def test_a_server_that_hangs(tmp_path):
  log = tmp_path / "log"
  with Servers({"x": Server((*BAD_SERVER, "count", str(log)), timeout=1)}) as servers:
    slow = run(servers, "x__slow")
    assert slow.outcome == "timeout" and slow.text.endswith("did not answer within 1 s")
    hang = run(servers, "x__hang")
    assert hang.outcome == "timeout" and "the next call starts it again" in hang.text
    assert run(servers, "x__echo").outcome == "ok"
    flood = run(servers, "x__flood")
    assert flood.outcome == "timeout" and "not started again" in flood.text
  _gone(log)


def test_close_ends_processes_that_are_busy(tmp_path):
  log = tmp_path / "log"
  servers = Servers(
    {str(i): Server((*BAD_SERVER, "count", str(log)), timeout=0.2) for i in range(3)}
  )
  servers._run(servers._connections["0"].call("hang", {}))
  servers.close()
  servers.close()
  assert len(log.read_text().split()) == 3
  _gone(log)


def test_servers_that_do_not_start(tmp_path):
  dies = Server(("sh", "-c", "yes no config | head -c 999999 >&2; exit 1"))
  hangs = Server((*BAD_SERVER, "hang"), start_timeout=1)
  with Servers({"none": Server(("/none",)), "dies": dies, "hangs": hangs}) as servers:
    none, died, hung = servers.notes
    assert servers.tools() == []
  assert "No such file" in none and "last words:" in died and "no config" in died
  assert hung == "MCP server hangs: it did not start within 1 s; its tools are off"
  assert len(died) < 800


def test_tools_that_cannot_be_used_are_left_out():
  with Servers({"x": Server((*BAD_SERVER, "bad"))}) as servers:
    assert [tool.name for tool in servers.tools()] == ["x__a_b", "x__deep"]
    notes = "\n".join(servers.notes)
    for says in (
      *("'a_b' is off: there is one named x__a_b", "more than 64 characters", "outside of itself"),
      *("'circle' is off", "'nowhere' is off", "'strange' is not valid", "more than 20000"),
    ):
      assert says in notes
    assert run(servers, "x__a_b").text == "spaced"
    assert run(servers, "x__deep", {"x": 1}).text.endswith("cannot be applied: RecursionError")


@pytest.mark.parametrize("schema", [True, [], {}, {"type": ["object"]}, {"type": "string"}])
def test_a_schema_has_to_be_of_an_object(schema):
  assert check_schema(schema)


def test_secrets_come_from_the_environment(monkeypatch):
  monkeypatch.setenv("TOKEN", "s3cret")
  script = "import os, sys; sys.exit(os.environ['A'] + str('TOKEN' in os.environ))"
  with Servers({"x": Server((sys.executable, "-c", script), env={"A": "<$TOKEN>"})}) as servers:
    assert "<s3cret>False" in servers.notes[0]


def _gone(log):
  deadline = time.monotonic() + 10
  for pid in log.read_text().split():
    while os.path.exists(f"/proc/{pid}"):
      assert time.monotonic() < deadline
      time.sleep(0.02)
