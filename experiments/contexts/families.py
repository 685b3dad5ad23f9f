"""Long tasks whose history is several times the window. Each is a list of units with a fact each.

A unit is done by one call, whose output has a line "FACT name = value" somewhere in long text. The
answer is the values, in order. What makes a family hard:

  facts   the facts are scattered over many long documents
  log     one long log, page by page; only its last page says which of the early facts are wanted
  steps   each step may be run once only; it prints much, and whoever runs it twice has failed
  shared  somebody else changes files midway; the answer is what they hold at the end
  busy    some parts never answer but have a backup, which the objective names

`Size` makes the same tasks for a small policy and its small window: shorter texts, fewer units,
names that are letters in order, and answers that name the facts, so that a request shows what comes
next, which a script knows of its task. Values are words with the letter of their name: where any
word could be any fact's, the small policy copied 0.12 of them right after 200 updates.
"""

import dataclasses
import random
import re
from collections.abc import Iterable, Mapping

from rome.envs.sandbox import Sandbox

_LINES = (
  "amber apple arrow ash azure",
  "basil birch bread brick brush",
  "candle cedar clover copper crane",
  "dahlia desk diamond dove drum",
  "eagle echo elder ember engine",
  "falcon feather fennel flint forest",
  "garnet ginger glass goose granite",
  "hammer harbor hazel heron honey",
  "indigo ink iris iron ivory",
  "jacket jade jasper jewel juniper",
)
WORDS = {line[0]: line.split() for line in _LINES}  # values of small tasks
LETTERS = "".join(WORDS)
NAMES = (
  "amber basil cedar dahlia ember fennel garnet hazel indigo jasper kelp lilac maple nettle ochre "
  "pepper quartz russet saffron thistle"
).split()
FACT = re.compile(r"FACT (\w+) = (\w+)")
_FILLER = (
  "the of and water stone over under grey slow river wind field made went long quiet".split()
)


@dataclasses.dataclass(frozen=True)
class Size:
  """How large tasks are.

  Attributes:
    small: whether units are named by `LETTERS`, as many as there are, with words as values.
    share: of a text's own length.
  """

  small: bool = False
  share: float = 1.0

  def values(self, rng: random.Random, units: int) -> dict[str, str]:
    """Names of facts and their values, for a family that has so many units by itself."""
    names = list(LETTERS) if self.small else rng.sample(NAMES, units)
    return {name: self.value(rng, name) for name in names}

  def value(self, rng: random.Random, name: str) -> str:
    return rng.choice(WORDS[name]) if self.small else str(rng.randrange(100, 1000))

  def answer(self, values: Mapping[str, str]) -> str:
    """What has to be answered where `values` are wanted, in their order."""
    if not self.small:
      return " ".join(values.values())
    return "; ".join(f"FACT {name} = {value}" for name, value in values.items())

  @property
  def wanted(self) -> str:
    """What an objective calls that."""
    return "facts" if self.small else "values"

  def keys(self, names: Iterable[str]) -> list[str]:
    """What the objective calls the units."""
    return list(names) if self.small else [str(i) for i, _ in enumerate(names, 1)]

  def text(self, characters: int) -> int:
    return round(self.share * characters)


LARGE, SMALL = Size(), Size(small=True, share=0.17)


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
    size: how large it is.
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
  size: Size
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


def _document(rng: random.Random, name: str, value: str, size: int) -> str:
  before = rng.randrange(size // 3, 2 * size // 3)
  return f"{filler(rng, before)}\nFACT {name} = {value}\n{filler(rng, size - before)}\n"


def facts(seed: int, size: Size = LARGE) -> Task:
  rng = random.Random(f"facts {seed}")
  values = size.values(rng, 14)
  keys, length = size.keys(values), size.text(1300)
  return Task(
    "facts",
    seed,
    f"Read the documents docs/{keys[0]} to docs/{keys[-1]}. Each has a line FACT name = value. "
    f"Answer with the {size.wanted} in the order of the documents.",
    {
      f"docs/{key}": _document(rng, *pair, length)
      for key, pair in zip(keys, values.items(), strict=True)
    },
    tuple(
      Unit(name, "read", {"path": f"docs/{key}"}) for key, name in zip(keys, values, strict=True)
    ),
    size.answer(values),
    size,
  )


def log(seed: int, size: Size = LARGE) -> Task:
  rng = random.Random(f"log {seed}")
  values = size.values(rng, 14)
  names = list(values)
  wanted = tuple(rng.sample(names[: 4 * len(names) // 7], 4))
  pages = []
  for name, value in values.items():
    lines = filler(rng, size.text(1300)).split("\n")[:25]
    lines[rng.randrange(len(lines) // 3, 2 * len(lines) // 3 + 1)] = f"FACT {name} = {value}"
    pages.append(lines)
  pages[-1][-1] = f"WANTED {' '.join(wanted)}"
  last = "Its last line names some of the facts (FACT name = value) that stood in it. "
  if size.small:
    how = f"Read the log, log/{names[0]} to log/{names[-1]}, in order. "
    files = {f"log/{name}": _lines(lines) for name, lines in zip(names, pages, strict=True)}
    calls: list[dict[str, object]] = [{"path": f"log/{name}"} for name in names]
  else:
    how = "Read the file log in order, 25 lines at a time, to its end. "
    files = {"log": _lines([line for lines in pages for line in lines])}
    calls = [{"path": "log", "offset": 1 + 25 * i, "limit": 25} for i, _ in enumerate(names)]
  return Task(
    "log",
    seed,
    f"{how}{last}Answer with {'these' if size.small else 'their values'}, in that order.",
    files,
    tuple(Unit(name, "read", call) for name, call in zip(names, calls, strict=True)),
    size.answer({name: values[name] for name in wanted}),
    size,
    last=names[-1],
    wanted=wanted,
  )


def _lines(lines: Iterable[str]) -> str:
  return "".join(f"{line}\n" for line in lines)


def steps(seed: int, size: Size = LARGE) -> Task:
  rng = random.Random(f"steps {seed}")
  values = size.values(rng, 12)
  keys = size.keys(values)
  files = {
    f".steps/{key}": f"{filler(rng, size.text(2600))}\nFACT {name} = {value}\n"
    for key, (name, value) in zip(keys, values.items(), strict=True)
  }
  cases = " ".join(f"{key}) n={name};;" for key, name in zip(keys, values, strict=True))
  files["step"] = f'case $1 in {cases} esac; echo "$n" >> done; cat ".steps/$1"\n'
  return Task(
    "steps",
    seed,
    f"Run the steps sh step {keys[0]} to sh step {keys[-1]}, in order, each of them once only. "
    f"Each prints a line FACT name = value. Answer with the {size.wanted} in order.",
    files,
    tuple(
      Unit(name, "shell", {"command": f"sh step {key}"}, again=False)
      for key, name in zip(keys, values, strict=True)
    ),
    size.answer(values),
    size,
    once=True,
  )


def shared(seed: int, size: Size = LARGE) -> Task:
  rng = random.Random(f"shared {seed}")
  values = size.values(rng, 12)
  names, keys, length = list(values), size.keys(values), size.text(1100)
  files = {
    f"conf/{key}": _document(rng, *pair, length)
    for key, pair in zip(keys, values.items(), strict=True)
  }
  at = rng.randrange(1, 5)
  changed = names[at]
  values[changed] = size.value(rng, changed)
  path, late = f"conf/{keys[at]}", range(len(names) - 5, len(names) - 2)
  return Task(
    "shared",
    seed,
    f"Read the files conf/{keys[0]} to conf/{keys[-1]}; others may change them while you work. "
    f"Each has a line FACT name = value. Answer with the {size.wanted} that they have at the end, "
    "in order.",
    files,
    tuple(
      Unit(name, "read", {"path": f"conf/{key}"}) for key, name in zip(keys, names, strict=True)
    ),
    size.answer(values),
    size,
    change=(path, _document(rng, changed, values[changed], length), names[rng.choice(late)]),
  )


def busy(seed: int, size: Size = LARGE) -> Task:
  rng = random.Random(f"busy {seed}")
  values = size.values(rng, 11)
  names, keys, length = list(values), size.keys(values), size.text(900)
  stuck = set(rng.sample(names, 4))
  files = {}
  for key, (name, value) in zip(keys, values.items(), strict=True):
    files[f"backup/{key}"] = _document(rng, name, value, length)
    answer = f"{filler(rng, size.text(400))}\nbusy, try again later\n"
    files[f".parts/{key}"] = answer if name in stuck else _document(rng, name, value, length)
  files["fetch"] = 'cat ".parts/$1"\n'
  return Task(
    "busy",
    seed,
    f"Fetch the parts by sh fetch {keys[0]} to sh fetch {keys[-1]}. Each prints a line FACT name = "
    "value; what a part that is busy would print is also in "
    f"backup/{keys[0]} to backup/{keys[-1]}. Answer with the {size.wanted} in order.",
    files,
    tuple(
      Unit(name, "shell", {"command": f"sh fetch {key}"}, backup={"command": f"cat backup/{key}"})
      for key, name in zip(keys, names, strict=True)
    ),
    size.answer(values),
    size,
  )


FAMILIES = {f.__name__: f for f in (facts, log, steps, shared, busy)}
