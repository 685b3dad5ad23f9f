"""Which programs a shell command runs, where that can be said for sure.

    split("git status && ls *.py")
    -> [Command(("git", "status"), False), Command(("ls", "*.py"), True)]

It knows words, quotes, `; & | && ||` and newlines, and redirections to /dev/null or among the
standard streams. All else (expansions, substitutions, compound statements, here-documents, files
that are written) is `Unclear`: then a person is asked. So it errs to one side only, which a test
holds against bash itself.

Own code, since what there is does not fit: shlex tells a quoted operator from no other, bashlex is
GPL and unmaintained since 2023, and the tree of tree-sitter-bash is no proof that bash reads the
text in the same way.
"""

import itertools
import posixpath
import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

Words = tuple[str, ...]


class Command(NamedTuple):
  """A simple command: its words, and whether one is a pattern, which may stand for other words."""

  words: Words
  pattern: bool = False


_MAX_LENGTH = 10_000
_MAX_DEPTH = 4
_OPERATOR = re.compile(r"&&|\|\||\|&|;|&|\||\n")
_REDIRECTION = re.compile(r"(?:(?:&>>?|>>?|<)[ \t]*/dev/null|>&[ \t]*[0-9])(?=[ \t\n;&|]|$)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*\+?=", re.ASCII)
# Variables by which a shell or a program is made to run something.
_TELLING = re.compile(
  r"(PATH|ENV|BASH_\w+|IFS|PS\d|PROMPT_COMMAND|SHELLOPTS|BASHOPTS|LD_\w+|GIT_\w+|PAGER|EDITOR)\+?=",
  re.ASCII,
)
_RESERVED = frozenset(
  "if then elif else fi for while until do done case esac in function select time coproc "
  "{ } [[ ]] !".split()
)
# Commands after which the same words mean something else, or whose work is not in their words.
_CHANGING = frozenset(
  ". alias at batch bind chroot compgen complete coproc crontab enable fc hash mapfile nsenter "
  "parallel readarray screen script set shopt source ssh su systemd-run tmux unalias "
  "unshare".split()
)
# They read text as commands, from an argument, a file or their input.
_SHELLS = frozenset("bash dash eval flock ksh sh trap watch zsh".split())
# They run what stands in their arguments. Interpreters (python -c) are beyond what can be told.
_LAUNCHERS = _SHELLS | frozenset(
  "builtin busybox command doas env exec find ionice jobs nice nohup setsid stdbuf strace sudo "
  "timeout xargs".split()
)
# Builtins that evaluate their arguments once more, such as the index in test -v 'a[$(date)]'.
_EVALUATING = _LAUNCHERS | frozenset(
  "[ declare export getopts let local printf read readonly test typeset unset wait".split()
)


class Unclear(ValueError):
  """It cannot be said what the command would run; the message says what stands in the way."""


def split(text: str) -> list[Command]:
  """The simple commands of a command, in order; quotes are taken away, variables set in front stay.

  Raises:
    Unclear: see there.
  """
  _check_characters(text)
  commands: list[Command] = []
  words: list[str] = []
  loose: list[bool] = []  # whether the word has a pattern outside of quotes
  i, joined = 0, ""
  while i < len(text):
    if text[i] in " \t":
      i += 1
    elif text.startswith("\\\n", i):
      i += 2
    elif found := _redirection(text, i):
      i = found
    elif operator := _OPERATOR.match(text, i):
      if words:
        commands.append(_checked(words, loose))
      elif operator[0] != "\n":
        raise Unclear(f"there is no command before {operator[0]!r}")
      if words or operator[0] != "\n":
        joined = operator[0]
      words, loose, i = [], [], operator.end()
    else:
      word, pattern, i = _word(text, i)
      words.append(word)
      loose.append(pattern)
  if words:
    commands.append(_checked(words, loose))
  elif joined in ("&&", "||", "|", "|&") or not commands:
    raise Unclear("a command is missing")
  return commands


def spell(words: Words) -> str:
  """A command as rules see it: one space between words, quotes only around words that need them."""
  return " ".join(shlex.quote(w) if not w or re.search(r"[\s'\"\\]", w) else w for w in words)


def reachable(words: Words, depth: int = 0) -> Iterator[Words]:
  """The command, and those that it starts in turn as far as that shows (env, xargs, sh -c, ...).

  Raises:
    Unclear: see there.
  """
  while words and _ASSIGNMENT.match(words[0]):
    words = words[1:]
  if not words:
    return
  yield from _by_name(words)
  if posixpath.basename(words[0]) not in _LAUNCHERS:
    return
  if depth == _MAX_DEPTH:
    raise Unclear("it starts commands within commands within commands")
  names = [posixpath.basename(word) for word in words]
  for i, word in enumerate(words):
    _check_launcher(names[i], words[i + 1 :])
    if i:
      yield from _by_name(words[i:])
    if i and not _SHELLS.isdisjoint(names[:i]):
      for inner in split(word):
        yield from reachable(inner.words, depth + 1)


def _check_launcher(name: str, rest: Words) -> None:
  """What it runs stands in its words, and not in its input or in names of files."""
  first = rest[0] if rest else "-"
  names = {posixpath.basename(word) for word in rest}
  if name in _SHELLS - {"eval", "flock", "trap", "watch"}:
    named = not re.match(r"[-+]|/dev/|/proc/", first)  # a file of commands
    if not named and not re.fullmatch(r"-[a-z]*c", first):
      raise Unclear(f"{name} may read commands from its input")
  elif name in ("find", "xargs"):
    replaced = any("{}" in word or re.match("-[iI]|--replace", word) for word in rest)
    if not _LAUNCHERS.isdisjoint(names) or (replaced and (name == "xargs" or _runs_found(rest))):
      raise Unclear(f"{name} may run what it finds")
  elif name == "env" and any(re.match("-S|--split-string|-[a-z]*S", word) for word in rest):
    raise Unclear("env takes a text apart")
  elif name in ("sudo", "doas") and re.match("-[a-zA-Z]*[si]|--shell|--login|-$", first):
    raise Unclear(f"{name} may start a shell")


def _runs_found(rest: Words) -> bool:
  """Whether find runs a file that it finds."""
  after = [two for one, two in itertools.pairwise(rest) if re.match("-(exec|ok)", one)]
  return any("{}" in word for word in after)


def _by_name(words: Words) -> Iterator[Words]:
  """With and without the directory of its program."""
  yield words
  name = posixpath.basename(words[0])
  if name != words[0]:
    yield (name, *words[1:])


def _check_characters(text: str) -> None:
  if len(text) > _MAX_LENGTH:
    raise Unclear(f"it has more than {_MAX_LENGTH} characters")
  for c in text:
    if c not in " \t\n" and (c.isspace() or ord(c) < 32 or 127 <= ord(c) < 160):
      raise Unclear(f"it has the character {c!r}")
    if "\ud800" <= c <= "\udfff":
      raise Unclear("it is no text")


def _redirection(text: str, i: int) -> int:
  """Where a harmless redirection at i ends, 0 where none begins."""
  digits = re.compile(r"[0-9]*").match(text, i)
  at = digits.end() if digits else i
  if text[at : at + 1] not in ("<", ">") and text[i : i + 2] != "&>":
    return 0
  found = _REDIRECTION.match(text, at)
  if found is None:
    raise Unclear("it redirects to or from a file")
  return found.end()


def _word(text: str, i: int) -> tuple[str, bool, int]:
  """The word at i, whether it has a pattern outside of quotes, where it ends."""
  start, parts, pattern = i, [], False
  while i < len(text) and text[i] not in " \t\n;&|<>":
    c = text[i]
    if c == "'":
      end = text.find("'", i + 1)
      if end < 0:
        raise Unclear("a quote is not closed")
      parts.append(text[i + 1 : end])
      i = end + 1
    elif c == '"':
      part, i = _double_quoted(text, i + 1)
      parts.append(part)
    elif c == "\\":
      if i + 1 == len(text):
        raise Unclear("it ends in a backslash")
      parts.append(text[i + 1].replace("\n", ""))
      i += 2
    else:
      if c in "$`()!" or (c == "#" and i == start):
        raise Unclear(f"it has {c!r}")
      pattern |= c in "*?[]{}~^"
      parts.append(c)
      i += 1
  return "".join(parts), pattern, i


def _double_quoted(text: str, i: int) -> tuple[str, int]:
  """What stands in double quotes that open before i, and where to go on."""
  parts = []
  while i < len(text) and text[i] != '"':
    c = text[i]
    if c in "$`!":
      raise Unclear(f"it has {c!r}")
    if c == "\\" and text[i + 1 : i + 2] in ("$", "`", '"', "\\", "\n"):
      parts.append(text[i + 1].replace("\n", ""))
      i += 2
      continue
    parts.append(c)
    i += 1
  if i == len(text):
    raise Unclear("a quote is not closed")
  return "".join(parts), i + 1


def _checked(words: list[str], loose: list[bool]) -> Command:
  """The words of a simple command, if they mean what they say."""
  at = 0
  while at < len(words) and _ASSIGNMENT.match(words[at]):
    if re.search(r"[$`]", words[at]) or _TELLING.match(words[at]):
      raise Unclear(f"it sets {words[at].partition('=')[0]}")
    at += 1
  if at < len(words):
    name = posixpath.basename(words[at])
    if name in _LAUNCHERS and any(loose):
      raise Unclear(f"{name} is given a pattern")
    if loose[at] or re.search(r"\s", words[at]):
      raise Unclear(f"its command is a pattern, {words[at]!r}")
    if words[at] in _RESERVED or name in _CHANGING:
      raise Unclear(f"it has {words[at]!r}")
    if name in _EVALUATING and any(re.search(r"[$`]", w) or _TELLING.match(w) for w in words):
      raise Unclear(f"{name} evaluates its arguments")
  return Command(tuple(words), any(loose))
