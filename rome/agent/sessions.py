"""Conversations on disk: one JSON Lines file each, appended to as it goes.

    with Session.create(model="m", cwd="/home/me/project") as session:
      outcome = drive(record(loop.run("Fix it."), context, session), model)
    with Session.resume(session.path) as session:
      context.begin(session.messages())

A record is on the disk before the conversation goes on, so what a killed one leaves is whole but
perhaps for its last line, which is dropped. It can be taken up where the loop stood: calls whose
results are not there are told to be unknown (`repaired`). Records:

    {"type": "session", "id", "cwd", "model", "system"?, "tools"?, "version", "time"}
    {"type": "reply", "purpose", "content", "calls", "finish", "prompt_tokens", "completion_tokens",
     "seconds", "extra", "time"}                      as it came; the messages follow
    {"type": "messages", "messages", "time"}          behind those of before
    {"type": "rewrite", "messages", "time"}           in the place of all of before
    {"type": "outcome", "reason", "time"}

Left out: conversations in a database, their removal by age (they are files).
"""

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
import time
from collections.abc import Generator, Mapping, Sequence
from typing import IO, Any

import rome
from rome.agent.context import Context
from rome.agent.loop import Outcome
from rome.agent.model import REASONING, Message, ModelReply, ModelRequest

INTERRUPTED = "[interrupted]"
UNKNOWN = "error: interrupted; whether it ran, and how far, is not known"
Record = dict[str, Any]


class SessionError(ValueError):
  """There is no such conversation, or it cannot be used; the message says why."""


def sessions_dir() -> pathlib.Path:
  """Where conversations lie: ~/.rome/sessions, for the owner alone."""
  path = pathlib.Path(os.path.expanduser("~")) / ".rome" / "sessions"
  path.mkdir(parents=True, exist_ok=True, mode=0o700)
  return path


class Session:
  """A conversation that is being written. A context manager.

  Attributes:
    id, path: its name and file.
    records: all of it.
  """

  def __init__(self, path: pathlib.Path, records: list[Record], file: IO[bytes]):
    self.id, self.path, self.records, self._file = path.stem, path, records, file

  @classmethod
  def create(cls, model: str, cwd: str, **more: Any) -> "Session":
    """Begins one; `more` goes into its first record."""
    name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    path = sessions_dir() / f"{name}.jsonl"
    session = cls(path, [], _locked(path, "xb"))
    head = {"id": name, "cwd": cwd, "model": model, "version": rome.__version__}
    session.write("session", **head, **more)
    return session

  @classmethod
  def resume(cls, path: pathlib.Path) -> "Session":
    """Goes on with one.

    Raises:
      SessionError: it cannot be read, or somebody else writes it.
    """
    if not path.is_file():
      raise SessionError(f"there is no conversation {path.stem!r}")
    file = _locked(path, "r+b")
    try:
      records, size = _whole(file.read(), path)
    except BaseException:
      file.close()
      raise
    file.truncate(size)
    file.seek(size)
    return cls(path, records, file)

  def write(self, kind: str, **fields: Any) -> None:
    """Appends a record and waits for the disk."""
    record = {"type": kind, **fields, "time": round(time.time(), 3)}
    text = json.dumps(record, ensure_ascii=False) + "\n"
    self._file.write(text.encode("utf-8", "surrogatepass"))
    self._file.flush()
    os.fsync(self._file.fileno())
    self.records.append(record)

  def messages(self) -> list[Message]:
    """The conversation as it is now, such that it can be gone on with."""
    return repaired(self.records)

  def close(self) -> None:
    self._file.close()

  def __enter__(self) -> "Session":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def _locked(path: pathlib.Path, mode: str) -> IO[bytes]:
  file = open(os.open(path, _FLAGS[mode], 0o600), mode.replace("x", "w"))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    file.close()
    raise SessionError(f"conversation {path.stem!r} is open in another rome agent") from error
  return file


_FLAGS = {"xb": os.O_RDWR | os.O_CREAT | os.O_EXCL, "r+b": os.O_RDWR}


def load(path: pathlib.Path) -> list[Record]:
  """The records of a conversation.

  Raises:
    SessionError: it cannot be read.
  """
  try:
    return _whole(path.read_bytes(), path)[0]
  except OSError as error:
    raise SessionError(f"conversation {path}: {error.strerror}") from error


def _whole(data: bytes, path: pathlib.Path) -> tuple[list[Record], int]:
  """Records, and the bytes that they take; a last line that was cut off is none."""
  records: list[Record] = []
  size = 0
  for line in data.splitlines(keepends=True):
    try:
      record = json.loads(line.decode("utf-8", "surrogatepass"))
      whole = line.endswith(b"\n") and isinstance(record, dict) and "type" in record
    except ValueError:
      whole = False
    if not whole and size + len(line) < len(data):
      raise SessionError(f"conversation {path}: line {len(records) + 1} is damaged")
    if whole:
      records.append(record)
      size += len(line)
  if not records or records[0]["type"] != "session":
    raise SessionError(f"{path} is no conversation of rome agent")
  return records, size


def find(name: str = "", cwd: str = "") -> pathlib.Path:
  """A conversation by the beginning of its name, or the last one of a directory.

  Raises:
    SessionError: there is none, or the name fits several.
  """
  if name:
    found = sorted(sessions_dir().glob(f"{_plain(name)}*.jsonl"))
    if len(found) != 1:
      why = f"fits {len(found)} conversations" if found else "is no conversation"
      raise SessionError(f"{name!r} {why} in {sessions_dir()}")
    return found[0]
  for path in sorted(sessions_dir().glob("*.jsonl"), reverse=True):
    with contextlib.suppress(SessionError):
      if load(path)[0].get("cwd") == cwd:
        return path
  raise SessionError(f"there is no conversation of {cwd} yet")


def recent(cwd: str, most: int = 10) -> list[tuple[str, str]]:
  """The last conversations of a directory: names, and the user's first words."""
  found = []
  for path in sorted(sessions_dir().glob("*.jsonl"), reverse=True):
    with contextlib.suppress(SessionError):
      records = load(path)
      words = next((m["content"] for m in settled(records) if m["role"] == "user"), "")
      if records[0].get("cwd") == cwd and words:
        found.append((path.stem, words))
    if len(found) == most:
      break
  return found


def _plain(name: str) -> str:
  if not all(c.isalnum() or c == "-" for c in name):
    raise SessionError(f"{name!r} is no name of a conversation")
  return name


def record(
  steps: Generator[ModelRequest, ModelReply, Outcome], context: Context, session: Session
) -> Generator[ModelRequest, ModelReply, Outcome]:
  """The same steps, written down as they go.

  Args:
    steps: of a loop.
    context: the loop's.
    session: where to.
  """
  known = Known(context, session)
  try:
    request = next(steps)
    while True:
      known.sync()
      started = time.monotonic()
      reply = yield request
      session.write("reply", **reply_record(request, reply, time.monotonic() - started))
      request = steps.send(reply)
  except StopIteration as end:
    known.sync()
    session.write("outcome", reason=end.value.reason)
    return end.value
  except GeneratorExit:
    steps.close()
    raise


class Known:
  """What of a context is on disk."""

  def __init__(self, context: Context, session: Session):
    self._context, self._session = context, session
    self._row = context.row
    self._count = len(settled(session.records))
    self._fixed = self._count == 0 or list(context.messages[: self._count]) == settled(
      session.records
    )

  def sync(self) -> None:
    """Writes what came since."""
    context = self._context
    if context.row != self._row or not self._fixed:
      self._session.write("rewrite", messages=list(context.messages))
      self._fixed = True
    elif new := context.messages[self._count :]:
      self._session.write("messages", messages=list(new))
    self._row, self._count = context.row, len(context.messages)


def reply_record(request: ModelRequest, reply: ModelReply, seconds: float) -> Record:
  """A reply as it is written."""
  found: Record = {
    "purpose": request.purpose,
    "content": reply.content,
    "calls": [[call.id, call.name, call.arguments] for call in reply.calls],
    "finish": reply.finish,
    "prompt_tokens": reply.prompt_tokens,
    "completion_tokens": reply.completion_tokens,
    "seconds": round(seconds, 3),
  }
  found |= reply.reasoning
  if reply.ids:
    found["extra"] = {"prompt_ids": list(request.ids), "completion_ids": list(reply.ids)}
  return found


def settled(records: Sequence[Mapping[str, Any]]) -> list[Message]:
  """The messages that were written."""
  found: list[Message] = []
  for entry in records:
    if entry["type"] == "rewrite":
      found = list(entry["messages"])
    elif entry["type"] == "messages":
      found += entry["messages"]
  return found


def repaired(records: Sequence[Mapping[str, Any]]) -> list[Message]:
  """The messages, ended such that a user's words may follow: a reply is the last one."""
  found = settled(records)
  last = next((r for r in reversed(records) if r["type"] in ("reply", "messages", "rewrite")), None)
  if last is not None and last["type"] == "reply" and last.get("purpose", "turn") == "turn":
    found.append(_message(last, sum(m["role"] == "assistant" for m in found)))
  return closed(found)


def closed(messages: Sequence[Message]) -> list[Message]:
  """The same with a result for every call, and a reply at the end."""
  found = list(messages)
  given = {m.get("tool_call_id") for m in found}
  for call in next((m for m in reversed(found) if m["role"] == "assistant"), {}).get(
    "tool_calls", ()
  ):
    if call["id"] not in given:
      found.append({"role": "tool", "tool_call_id": call["id"], "content": UNKNOWN})
  if found and found[-1]["role"] != "assistant":
    found.append({"role": "assistant", "content": INTERRUPTED})
  return found


def _message(reply: Mapping[str, Any], turn: int) -> Message:
  """As `Context.reply` makes it."""
  message: Message = {"role": "assistant", "content": reply["content"]}
  message |= {name: reply[name] for name in REASONING if isinstance(reply.get(name), str)}
  calls = [
    {"id": f"call_{turn}_{i}", "type": "function", "function": {"name": name, "arguments": text}}
    for i, (_, name, text) in enumerate(reply["calls"])
  ]
  return {**message, "tool_calls": calls} if calls else message


def take_up(context: Context, messages: Sequence[Message]) -> None:
  """Puts a conversation that ends in a reply into an empty context, such that it can be gone on
  with; `turns` goes on counting, as ids of calls are made of it."""
  if not messages:
    return
  *before, last = messages
  context.begin(before)
  context.turns = sum(m["role"] == "assistant" for m in before)
  reasoning = {name: last[name] for name in REASONING if name in last}
  context.reply(ModelReply(last["content"], reasoning=reasoning))
