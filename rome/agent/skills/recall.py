"""Retrieval: a tool that searches files of the workspace and what has left the context.

The index is lexical (BM25) over pieces of some lines. A search first looks which files are new or
changed, by time and size, and reads only these; pieces of a context come from `Compress` as they
leave it. Of two pieces that fit equally well the later one comes first.

Bounds: `MAX_FILES` text files below `MAX_FILE` bytes; an answer says where there are more. Hidden
files are left out, but for long outputs that went to files. Files travel as archives, some
megabytes each, which lie on the agent's disk meanwhile. The scores are made anew when something
changed. Left out: embeddings, stemming.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rome.agent.model import Message
from rome.agent.skills.lossless import OUTPUTS
from rome.agent.tools.base import READ, Tool, ToolResult, parameters
from rome.agent.workspace import Refused, Workspace

MAX_FILES = 1000
MAX_FILE = 256 << 10  # bytes
MAX_ARCHIVE = 2000  # pieces that left the context, the last ones
_LINES, _OVERLAP, _CHARACTERS = 30, 5, 1500  # of a piece
_WORD = re.compile(r"[a-z]+|\d+")
_LISTED = re.compile(r"([0-9]+ [0-9]+ [0-9]{1,7}) \./([^\0]{1,1000})")  # times and size, path
_BUNDLE = 4 << 20  # bytes of files that are fetched at once
_SPOOL = ".rome/recall"  # what a script has to say where its output has no room for it
# $1: the root, $2: the spool, $3: kilobytes of a file, $4: files, $5: outputs.
_LIST = """
cd -- "$1" && mkdir -p "${2%/*}" && {
  find . -path '*/.*' -prune -o -type f -size "-$3k" -exec stat -c '%Y %Z %s %n' {} +
  [ ! -d "$5" ] || find "./$5" -type f -size "-$3k" -exec stat -c '%Y %Z %s %n' {} +
} | sort -k 4 | head -n "$4" > "$2"
"""
# $1: the root, $2: the spool, the rest: files. Some may be gone or unreadable.
_PACK = 'cd -- "$1" && s=$2 && shift 2 && tar -cf - -- "$@" | gzip -1 > "$s"'
_DROP = 'rm -f -- "$1/$2"'


class Recall:
  """See the module. `archive` is what `Compress` takes; `tool` is for the executor.

  Args:
    workspace: the agent's.
    shown: pieces of an answer.
    size: characters of a piece that an answer shows.
  """

  def __init__(self, workspace: Workspace, shown: int = 5, size: int = 800):
    if shown < 1 or size < 1:
      raise ValueError(f"Recall: shown and size must be at least 1, got {shown} and {size}")
    self._workspace, self._shown, self._size = workspace, shown, size
    self._files: dict[str, tuple[str, list[tuple[int, str]]]] = {}  # path -> its stamp, its pieces
    self._archive: list[tuple[str, str]] = []  # where a piece was, the piece
    self._index: Any = None
    self._pieces: list[tuple[str, str]] = []

  def tool(self) -> Tool:
    """The tool `recall`."""
    return Tool(
      "recall",
      "Searches the files of the workspace, and what was said and seen earlier and is no longer in"
      " the context, for words. Gives the pieces that fit best.",
      parameters({"query": {"type": "string", "description": "Words to look for."}}),
      lambda arguments: self.search(arguments["query"]),
      READ,
    )

  def archive(self, messages: Sequence[Message]) -> None:
    """Takes messages that leave a context."""
    for message in messages:
      calls = [call["function"] for call in message.get("tool_calls", ())]
      text = "\n".join([message["content"], *(f"{c['name']} {c['arguments']}" for c in calls)])
      self._archive += [
        (f"earlier, {message['role']}", piece) for _, piece in _cut(text[:MAX_FILE])
      ]
    del self._archive[:-MAX_ARCHIVE]
    self._index = None

  def search(self, query: str) -> ToolResult:
    """The pieces that fit best, each with where it is."""
    words = _words(query)
    if not words:
      return ToolResult("error: recall: the query has no words", "invalid_arguments")
    try:
      more = self._refresh()
    except Refused as error:
      return ToolResult(f"error: recall: {error}", error.outcome)
    found = self._best(words)
    note = f"\n(only {MAX_FILES} files were searched)" if more else ""
    if not found:
      return ToolResult(f"nothing was found{note}")
    texts = [f"## {where}\n{piece[: self._size].rstrip()}" for where, piece in found]
    return ToolResult("\n\n".join(texts) + note)

  def _refresh(self) -> bool:
    """Reads what is new or changed; returns whether there are more files than are read."""
    listed = self._listed()
    gone = self._files.keys() - listed.keys()
    changed = [p for p, stamp in listed.items() if self._files.get(p, ("", []))[0] != stamp]
    for path in gone:
      del self._files[path]
    for path, text in self._fetched(changed, listed):
      self._files[path] = listed[path], _cut(text)
    if gone or changed:
      self._index = None
    self._workspace.ask(_DROP, self._workspace.root, _SPOOL)
    return len(listed) >= MAX_FILES

  def _listed(self) -> dict[str, str]:
    """Path -> times and size, of the files that may be read."""
    size, most = str(MAX_FILE >> 10), str(MAX_FILES)
    self._workspace.ask(_LIST, self._workspace.root, _SPOOL, size, most, OUTPUTS)
    lines = self._spooled().decode("utf-8", "replace").split("\n")[:MAX_FILES]
    found = filter(None, map(_LISTED.fullmatch, lines))  # the agent might have forged it
    return {match[2]: match[1] for match in found}

  def _fetched(self, paths: Sequence[str], listed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Texts of files; "" of those that cannot be read or are no text."""
    some: list[str] = []
    room = _BUNDLE
    for i, path in enumerate(paths):
      some.append(path)
      room -= int(listed[path].rpartition(" ")[2]) + 1024
      if room > 0 and i + 1 < len(paths):
        continue
      self._workspace.ask(_PACK, self._workspace.root, _SPOOL, *some)
      data = _unpacked(self._spooled())
      yield from ((path, _text(data.get(path, b""))) for path in some)
      some, room = [], _BUNDLE

  def _spooled(self) -> bytes:
    return self._workspace.read(f"{self._workspace.root}/{_SPOOL}").data

  def _best(self, words: Sequence[str]) -> list[tuple[str, str]]:
    import bm25s  # type: ignore[import-untyped]  # only where it is used: it brings numpy

    if self._index is None:
      self._pieces = [
        (f"{path}, line {line}", piece)
        for path, (_, pieces) in self._files.items()
        for line, piece in pieces
      ]
      self._pieces += self._archive
      self._index = bm25s.BM25()
      corpus = [_words(f"{where} {piece}") for where, piece in self._pieces]
      if any(corpus):
        self._index.index(corpus, show_progress=False)
    if not any(_words(piece) for _, piece in self._pieces):
      return []
    known = [word for word in words if word in self._index.vocab_dict]
    if not known:
      return []
    scores = self._index.get_scores(known)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -i))
    return [self._pieces[i] for i in order[: self._shown] if scores[i] > 0]


def _words(text: str) -> list[str]:
  return _WORD.findall(text.lower())


def _unpacked(data: bytes) -> dict[str, bytes]:
  """Files of an archive that the agent might have forged: no more than was asked for."""
  try:
    plain = zlib.decompressobj(31).decompress(data, 2 * _BUNDLE)
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
      members = [m for m in archive if m.isreg() and m.size <= MAX_FILE]
      return {m.name: archive.extractfile(m).read() for m in members}  # type: ignore[union-attr]
  except Exception:  # tarfile has no one error for what it cannot read
    return {}


def _text(data: bytes) -> str:
  return "" if b"\0" in data[:4096] else data.decode("utf-8", "replace")


def _cut(text: str) -> list[tuple[int, str]]:
  """Pieces of some lines that overlap, each with the number of its first line."""
  lines = text.split("\n")
  found, at = [], 0
  while at < len(lines):
    end, size = at, 0
    while end < len(lines) and end - at < _LINES and (end == at or size < _CHARACTERS):
      size += len(lines[end]) + 1
      end += 1
    if piece := "\n".join(lines[at:end]).strip():
      for start in range(0, len(piece), 2 * _CHARACTERS):
        found.append((at + 1, piece[start : start + 2 * _CHARACTERS]))
    if end >= len(lines):
      break
    at = max(end - _OVERLAP, at + 1)
  return found
