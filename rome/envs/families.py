"""Six procedural families of small shell tasks, and the split of their seeds.

An instance is fully determined by `family/seed`. Only `random.Random.random` is used to draw: it is
the one method that Python promises to keep the same between versions. Wording is constant within a
family and names come from one small lexicon, so that a byte-level model of a few million parameters
can learn them in minutes; every instance has distractors, and its tests compare exact contents, so
that neither doing nothing nor a guess passes.

Training and held-out seeds are disjoint ranges. Small spaces collide by chance all the same
("Make yak.txt mode 640." has a few hundred variants), so the questions themselves are split too:
the pair (instruction, reference solution) is hashed, a quarter of the hashes belong to held-out
seeds and the rest to training seeds, and a generator draws again until its draw falls on its own
side. No held-out question is therefore ever seen in training, by construction.

Left out: paraphrases, longer horizons, families that need more than two commands.
"""

import hashlib
import os
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from rome.envs import task as task_lib

# Short, none within another, distinct first letters as far as 26 letters go.
LEXICON = tuple(
  "ant bee cat crow dog duck elk fox frog gnu goat hare hen ibex jay koi lion mole newt owl pig"
  " quail ram seal swan toad urial vole wolf xerus yak zebra".split()
)
MODES = (0o400, 0o440, 0o444, 0o600, 0o640, 0o660, 0o700, 0o711, 0o750, 0o755, 0o770, 0o775)
HELD_OUT_FIRST_SEED = 1_000_000
_HELD_OUT_BYTE = 64  # a first hash byte below this is held out: a quarter of all questions

TaskLike = task_lib.Task | str | os.PathLike[str]
_T = TypeVar("_T")


class Draft(NamedTuple):
  """What a generator draws; `generate` gives it its name."""

  instruction: str
  files: Mapping[str, task_lib.TaskFile]
  tests: str
  solution: tuple[str, ...]


# --- drawing -------------------------------------------------------------------------------------


def between(rng: random.Random, low: int, high: int) -> int:
  """A whole number in [low, high]."""
  return low + int(rng.random() * (high - low + 1))


def distinct(rng: random.Random, population: Sequence[_T], count: int) -> list[_T]:
  """`count` different items, in random order."""
  left = list(population)
  return [left.pop(between(rng, 0, len(left) - 1)) for _ in range(count)]


def _word_lines(rng: random.Random, count: int, words: Sequence[str] = LEXICON) -> bytes:
  """A text of `count` lines, one word each."""
  lines = [words[between(rng, 0, len(words) - 1)] for _ in range(count)]
  return "".join(f"{line}\n" for line in lines).encode()


# --- tests ---------------------------------------------------------------------------------------

# A test never opens what is not a regular file (a fifo left by the agent would hang it), never
# writes (the disk may be full), reads only up to a bound, and compares by builtins: a batch of
# episodes spends more time in forks than in anything else its tests do.
_PRELUDE = """\
fail() { echo "$1"; exit 1; }
regular() { [ -f "$1" ] && [ ! -L "$1" ] || fail "$1 is missing"; }
content() {  # succeeds where the file ends before 4096 bytes and before any NUL
  regular "$1"
  ! IFS= read -r -d '' -n 4096 got < "$1"
}
same() { content "$1" && [ "$got" = "$2" ] || fail "$1 has the wrong content"; }
gone() { [ ! -e "$1" ] && [ ! -L "$1" ] || fail "$1 is still there"; }
mode() { got=$(stat -c %a "$1"); [ "$got" = "$2" ] || fail "$1 has mode $got, not $2"; }
answer() {
  content ans || fail "ans is too long or binary"
  while [ "${got%$'\\n'}" != "$got" ]; do got=${got%$'\\n'}; done
  for want; do [ "$got" = "$want" ] && return; done
  got=${got::200}
  fail "ans holds ${got@Q}, not '$1'"
}
"""


def script(*lines: str) -> str:
  return _PRELUDE + "".join(f"{line}\n" for line in lines)


def same(path: str, data: bytes) -> str:
  return f"same {shlex.quote(path)} {shlex.quote(data.decode())}"


def _unchanged(files: Mapping[str, bytes]) -> list[str]:
  return [same(path, data) for path, data in files.items()]


def plain(files: Mapping[str, bytes]) -> dict[str, task_lib.TaskFile]:
  return {path: task_lib.TaskFile(files[path]) for path in sorted(files)}


# --- families ------------------------------------------------------------------------------------


def _count(rng: random.Random) -> Draft:
  """Lines of one file among three that all differ in length."""
  names = [f"{word}.txt" for word in distinct(rng, LEXICON, 3)]
  lengths = distinct(rng, range(2, 61), 3)
  files = {name: _word_lines(rng, length) for name, length in zip(names, lengths, strict=True)}
  return Draft(
    f"How many lines in {names[0]}? Write to ans.",
    plain(files),
    script(f"answer {lengths[0]}", *_unchanged(files)),
    (f"wc -l < {names[0]}", f"echo {lengths[0]} > ans"),
  )


def _find(rng: random.Random) -> Draft:
  """A file below one directory; its namesake lies below another. Any path to it is right."""
  words = distinct(rng, LEXICON, 9)  # all different: no directory is named like a file
  tops, below, names = words[:2], words[2:6], words[6:]
  paths = [
    f"{tops[0]}/{below[0]}/{names[0]}",
    f"{tops[1]}/{below[1]}/{names[0]}",
    f"{tops[0]}/{below[2]}/{names[1]}",
    f"{tops[1]}/{below[3]}/{names[2]}",
  ]
  files = {path: _word_lines(rng, 2) for path in paths}
  return Draft(
    f"Write the path of {names[0]} in {tops[0]} to ans.",
    plain(files),
    script(f'answer ./{paths[0]} {paths[0]} "$PWD/{paths[0]}"', *_unchanged(files)),
    (f"find {tops[0]} -name {names[0]} > ans",),
  )


def _extract(rng: random.Random) -> Draft:
  """One value of a file of `word=number` lines with eight different words and numbers."""
  words = distinct(rng, LEXICON, 8)
  numbers = distinct(rng, range(1, 100), 8)
  order = distinct(rng, range(8), 8)
  files = {"cfg": "".join(f"{words[i]}={numbers[i]}\n" for i in order).encode()}
  return Draft(
    f"Write the value of {words[0]} in cfg to ans.",
    plain(files),
    script(f"answer {numbers[0]}", *_unchanged(files)),
    (f"grep {words[0]} cfg", f"echo {numbers[0]} > ans"),
  )


def _edit(rng: random.Random) -> Draft:
  """Append a line to one file of two."""
  names = [f"{word}.txt" for word in distinct(rng, LEXICON, 2)]
  word = distinct(rng, LEXICON, 1)[0]
  files = {name: _word_lines(rng, 4) for name in names}
  wanted = files[names[0]] + f"{word}\n".encode()
  return Draft(
    f"Add the line {word} to {names[0]}.",
    plain(files),
    script(same(names[0], wanted), same(names[1], files[names[1]])),
    (f"echo {word} >> {names[0]}",),
  )


def _permissions(rng: random.Random) -> Draft:
  """Set the mode of one file of two."""
  names = [f"{word}.txt" for word in distinct(rng, LEXICON, 2)]
  mode = MODES[between(rng, 0, len(MODES) - 1)]
  files = {name: _word_lines(rng, 3) for name in names}
  return Draft(
    f"Make {names[0]} mode {mode:o}.",
    plain(files),
    script(
      *_unchanged(files),
      f"mode {names[0]} {mode:o}",
      f"mode {names[1]} {task_lib.DEFAULT_MODE:o}",
    ),
    (f"chmod {mode:o} {names[0]}",),
  )


def _move(rng: random.Random) -> Draft:
  """Move one of two files into one of two directories."""
  directories = distinct(rng, LEXICON, 2)
  names = [f"{word}.txt" for word in distinct(rng, LEXICON, 4)]
  paths = [*names[:2], f"{directories[0]}/{names[2]}", f"{directories[1]}/{names[3]}"]
  files = {path: _word_lines(rng, 3) for path in paths}
  wanted = {**files, f"{directories[0]}/{names[0]}": files[names[0]]}
  del wanted[names[0]]
  return Draft(
    f"Move {names[0]} into {directories[0]}.",
    plain(files),
    script(*_unchanged(wanted), f"gone {names[0]}"),
    (f"mv {names[0]} {directories[0]}",),
  )


FAMILIES: dict[str, Callable[[random.Random], Draft]] = {
  "count": _count,
  "find": _find,
  "extract": _extract,
  "edit": _edit,
  "permissions": _permissions,
  "move": _move,
}
# Resolved by name like the others, but left out where "all families" is meant, as in training.
SPECIAL_FAMILIES: dict[str, Callable[[random.Random], Draft]] = {}


# --- naming --------------------------------------------------------------------------------------


def generate(family: str, seed: int) -> task_lib.Task:
  """The instance `family/seed`, the same on every machine and Python version.

  Args:
    family: a key of `FAMILIES` or `SPECIAL_FAMILIES`.
    seed: 0 and up; from `HELD_OUT_FIRST_SEED` the instance is a held-out one.

  Raises:
    TaskError: on an unknown family or a negative seed.
  """
  known = FAMILIES | SPECIAL_FAMILIES
  if family not in known:
    raise task_lib.TaskError(f"unknown task family {family!r}; the families are {_family_names()}")
  if seed < 0:
    raise task_lib.TaskError(f"task {family}/{seed}: a seed is 0 or more")
  rng = random.Random(f"{family}/{seed}")
  draft = known[family](rng)
  while _is_held_out(draft) != (seed >= HELD_OUT_FIRST_SEED):
    draft = known[family](rng)
  return task_lib.Task(id=f"{family}/{seed}", family=family, **draft._asdict())


def _is_held_out(draft: Draft) -> bool:
  question = "\n".join([draft.instruction, *draft.solution])
  return hashlib.sha256(question.encode()).digest()[0] < _HELD_OUT_BYTE


def _family_names() -> str:
  return ", ".join([*FAMILIES, *SPECIAL_FAMILIES])


def split_seed(split: str, index: int) -> int:
  """Seed of the instance number `index` of "train" or "held_out".

  Raises:
    ValueError: on an unknown split or an index outside 0 .. HELD_OUT_FIRST_SEED - 1.
  """
  if split not in ("train", "held_out"):
    raise ValueError(f"unknown split {split!r}; use 'train' or 'held_out'")
  if not 0 <= index < HELD_OUT_FIRST_SEED:
    raise ValueError(f"index {index} is outside 0 to {HELD_OUT_FIRST_SEED - 1}")
  return index + (HELD_OUT_FIRST_SEED if split == "held_out" else 0)


def resolve_task(task: TaskLike) -> task_lib.Task:
  """A task from what a user may name it by: itself, an id like "count/17", or a directory.

  A string of the form family/number is an id; write a directory of that shape as "./count/17".

  Raises:
    TaskError: where nothing goes by that name.
  """
  if isinstance(task, task_lib.Task):
    return task
  if isinstance(task, str):
    family, _, seed = task.partition("/")
    if seed.isascii() and seed.isdigit() and family.isidentifier():
      return generate(family, int(seed))
  if not os.path.exists(task):
    raise task_lib.TaskError(
      f"unknown task {str(task)!r}: neither a directory nor family/number"
      f" (families: {_family_names()})"
    )
  return task_lib.load_task(task)
