"""Long tasks whose history is several times the window. Each is a list of units with a fact each.

A unit is done by one call, whose output has a line "FACT name = value" somewhere in long text. The
answer is the values, in order. What makes a family hard:

  facts   the facts are scattered over many long documents
  log     one long log, page by page; only its last page says which of the early facts are wanted
  steps   each step may be run once only; it prints much, and whoever runs it twice has failed
  shared  somebody else changes files midway; the answer is what they hold at the end
  busy    some parts never answer but have a backup, which the objective names
"""

import dataclasses
import random
import re
from collections.abc import Mapping

from rome.envs.sandbox import Sandbox

NAMES = (
  "amber basil cedar dahlia ember fennel garnet hazel indigo jasper kelp lilac maple nettle ochre "
  "pepper quartz russet saffron thistle"
).split()
FACT = re.compile(r"FACT (\w+) = (\w+)")
_FILLER = (
  "the of and water stone over under grey slow river wind field made went long quiet".split()
)


@dataclasses.dataclass(frozen=True)
class Unit:
  """Attributes:
  name: of its fact.
  tool, arguments: the call that does it.
  again: whether it may be done again.
  backup: the call to make where it does not answer.
  """

  name: str
  tool: str
  arguments: Mapping[str, object]
  again: bool = True
  backup: Mapping[str, object] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
  """One task.

  Attributes:
    family, seed: what it was made of.
    objective: the instruction.
    files: path -> content, in the sandbox.
    units: in order.
    answer: what has to be answered.
    last: the unit that says which are wanted; "" where all are.
    wanted: their names, in order.
    change: a file that somebody else changes, its new content, behind which unit; None for none.
    once: whether the file `done` must hold each name once.
  """

  family: str
  seed: int
  objective: str
  files: Mapping[str, str]
  units: tuple[Unit, ...]
  answer: str
  last: str = ""
  wanted: tuple[str, ...] = ()
  change: tuple[str, str, str] | None = None
  once: bool = False

  def solved(self, said: str, sandbox: Sandbox) -> bool:
    """Whether an answer, and what was done, is right."""
    if said.split() != self.answer.split():
      return False
    if not self.once:
      return True
    done = sandbox.read_file("done").decode().split()
    return sorted(done) == sorted(unit.name for unit in self.units)


def filler(rng: random.Random, size: int) -> str:
  """Lines of words without meaning."""
  lines: list[str] = []
  while sum(map(len, lines)) < size:
    lines.append(" ".join(rng.choice(_FILLER) for _ in range(9)))
  return "\n".join(lines)


def _document(rng: random.Random, name: str, value: int, size: int) -> str:
  before = rng.randrange(size // 3, 2 * size // 3)
  return f"{filler(rng, before)}\nFACT {name} = {value}\n{filler(rng, size - before)}\n"


def _drawn(rng: random.Random, n: int) -> dict[str, int]:
  return {name: rng.randrange(100, 1000) for name in rng.sample(NAMES, n)}


def _answer(values: Mapping[str, int]) -> str:
  return " ".join(map(str, values.values()))


def facts(seed: int) -> Task:
  rng = random.Random(f"facts {seed}")
  values = _drawn(rng, 14)
  return Task(
    "facts",
    seed,
    "Read the documents docs/1 to docs/14. Each has a line FACT name = value. Answer with the "
    "values in the order of the documents.",
    {f"docs/{i}": _document(rng, *pair, 1300) for i, pair in enumerate(values.items(), 1)},
    tuple(Unit(name, "read", {"path": f"docs/{i}"}) for i, name in enumerate(values, 1)),
    _answer(values),
  )


def log(seed: int) -> Task:
  rng = random.Random(f"log {seed}")
  values = _drawn(rng, 14)
  names = list(values)
  wanted = tuple(rng.sample(names[:8], 4))
  pages = []
  for name, value in values.items():
    lines = filler(rng, 1300).split("\n")[:25]
    lines[rng.randrange(8, 17)] = f"FACT {name} = {value}"
    pages += lines
  pages[-1] = f"WANTED {' '.join(wanted)}"
  return Task(
    "log",
    seed,
    "Read the file log in order, 25 lines at a time, to its end. Its last line names some of the "
    "facts (FACT name = value) that stood in it. Answer with their values, in that order.",
    {"log": "\n".join(pages) + "\n"},
    tuple(
      Unit(name, "read", {"path": "log", "offset": 1 + 25 * i, "limit": 25})
      for i, name in enumerate(names)
    ),
    " ".join(str(values[name]) for name in wanted),
    last=names[-1],
    wanted=wanted,
  )


def steps(seed: int) -> Task:
  rng = random.Random(f"steps {seed}")
  values = _drawn(rng, 12)
  files = {f".steps/{i}": f"{filler(rng, 2600)}\nFACT {name} = {value}\n"
           for i, (name, value) in enumerate(values.items(), 1)}  # fmt: skip
  names = " ".join(values)
  files["step"] = f'k=$1; set -- {names}; shift $((k - 1)); echo "$1" >> done; cat ".steps/$k"\n'
  return Task(
    "steps",
    seed,
    "Run the steps sh step 1 to sh step 12, in order, each of them once only. Each prints a line "
    "FACT name = value. Answer with the values in order.",
    files,
    tuple(
      Unit(name, "shell", {"command": f"sh step {i}"}, again=False)
      for i, name in enumerate(values, 1)
    ),
    _answer(values),
    once=True,
  )


def shared(seed: int) -> Task:
  rng = random.Random(f"shared {seed}")
  values = _drawn(rng, 12)
  names = list(values)
  files = {f"conf/{i}": _document(rng, *pair, 1100) for i, pair in enumerate(values.items(), 1)}
  at = rng.randrange(1, 5)
  changed = names[at]
  values[changed] = rng.randrange(100, 1000)
  path = f"conf/{at + 1}"
  return Task(
    "shared",
    seed,
    "Read the files conf/1 to conf/12; others may change them while you work. Each has a line "
    "FACT name = value. Answer with the values that they have at the end, in order.",
    files,
    tuple(Unit(name, "read", {"path": f"conf/{i}"}) for i, name in enumerate(names, 1)),
    _answer(values),
    change=(path, _document(rng, changed, values[changed], 1100), names[rng.randrange(7, 10)]),
  )


def busy(seed: int) -> Task:
  rng = random.Random(f"busy {seed}")
  values = _drawn(rng, 11)
  names = list(values)
  stuck = set(rng.sample(names, 4))
  files = {}
  for i, (name, value) in enumerate(values.items(), 1):
    files[f"backup/{i}"] = _document(rng, name, value, 900)
    answer = f"{filler(rng, 400)}\nbusy, try again later\n"
    files[f".parts/{i}"] = answer if name in stuck else _document(rng, name, value, 900)
  files["fetch"] = 'cat ".parts/$1"\n'
  return Task(
    "busy",
    seed,
    "Fetch the parts by sh fetch 1 to sh fetch 11. Each prints a line FACT name = value; what a "
    "part that is busy would print is also in backup/1 to backup/11. Answer with the values in "
    "order.",
    files,
    tuple(
      Unit(name, "shell", {"command": f"sh fetch {i}"}, backup={"command": f"cat backup/{i}"})
      for i, name in enumerate(names, 1)
    ),
    _answer(values),
  )


FAMILIES = {f.__name__: f for f in (facts, log, steps, shared, busy)}
