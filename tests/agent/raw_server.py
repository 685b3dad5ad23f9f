"""A server that keeps what it is sent, byte by byte, and answers what a test says."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator


class RawServer:
  """Answers the n-th request with the n-th answer, the last one again and again.

  Attributes:
    bodies: of the requests so far.
    url: its address.
  """

  def __init__(self, answers: list[bytes]):
    self.bodies: list[bytes] = []
    self._answers = answers
    self._socket = socket.create_server(("127.0.0.1", 0))
    self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def _run(self) -> None:
    while True:
      try:
        connection, _ = self._socket.accept()
      except OSError:
        return
      with connection, contextlib.suppress(OSError):
        self._serve(connection)

  def _serve(self, connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
      if not (part := connection.recv(65536)):
        return
      data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
      (
        int(line.split(b":")[1])
        for line in head.split(b"\r\n")
        if line[:15].lower() == b"content-length:"
      ),
      0,
    )
    while len(body) < length:
      body += connection.recv(65536)
    self.bodies.append(body)
    connection.sendall(self._answers[min(len(self.bodies), len(self._answers)) - 1])

  def close(self) -> None:
    self._socket.close()


@contextlib.contextmanager
def serving(*answers: bytes) -> Iterator[RawServer]:
  server = RawServer(list(answers))
  try:
    yield server
  finally:
    server.close()


def http(
  body: bytes, kind: str = "application/json", status: str = "200 OK", more: int = 0
) -> bytes:
  """An answer; `more` bytes are announced that do not come."""
  head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body) + more}\r\n"
  return head.encode() + b"Connection: close\r\n\r\n" + body


def whole(text: str, *calls: tuple[str, str]) -> bytes:
  """A chat completion."""
  message: dict = {"role": "assistant", "content": text}
  if calls:
    message["tool_calls"] = [
      {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
      for i, (name, arguments) in enumerate(calls)
    ]
  choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
  usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
  body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
  return http(json.dumps({**body, "choices": [choice], "usage": usage}).encode())


def chunk(delta: dict, finish: str | None = None, usage: dict | None = None) -> bytes:
  """One event of a stream."""
  body = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
  choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
  found = {**body, "choices": [] if usage else choices, "usage": usage}
  return b"data: " + json.dumps(found).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def events(*parts: bytes, more: int = 0) -> bytes:
  return http(b"".join(parts), "text/event-stream", more=more)
