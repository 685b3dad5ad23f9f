"""What a compiled program moves, read off its HLO text: collectives, and memory traffic.

XLA's own cost analysis counts the body of a loop once and knows nothing of custom kernels, which
makes it useless for scanned layers. Here a body counts as often as its loop runs, where that can be
told from the text; else once.

Left out: floating-point operations (a plan counts those of the model), and what a kernel reads more
than once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
  r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][\w\-]*)"
  r"\((?P<inside>[^()]*(?:\([^()]*\)[^()]*)*)\)(?P<attributes>.*)$"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUP_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_GROUP_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
# Neither read nor write memory themselves.
_FREE = frozenset(
  "parameter constant tuple get-tuple-element bitcast while call conditional after-all "
  "partition-id replica-id opt-barrier".split()
)


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind, per device and run of the program.

  Attributes:
    count: how many run.
    bytes: size of their results; of reduce-scatters, of what they reduce.
    sent: bytes that a device must send, by ring algorithms.
  """

  count: int
  bytes: float
  sent: float


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  op: str
  inside: str  # what stands between the parentheses
  attributes: str

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.inside)

  @functools.cached_property
  def sizes(self) -> list[float]:
    """Bytes of its arrays in main memory; those in others, as `S(1)`, a TPU's vectors, have 0."""
    return [0.0 if "S(" in layout else size for size, layout in _arrays(self.shape)]

  @property
  def size(self) -> float:
    return sum(self.sizes)


def _arrays(shape: str) -> Iterator[tuple[float, str]]:
  for dtype, dims, layout in _ARRAY.findall(shape):
    digits = re.match(r"[a-z]+(\d+)", dtype)
    bits = _BITS.get(dtype, int(digits[1]) if digits else 0)
    yield bits / 8 * math.prod(int(d) for d in dims.split(",") if d), layout


class Program:
  """A compiled, partitioned program.

  Args:
    text: `compiled.as_text()`.
    devices: how many it runs on: the group of a collective that names none.
  """

  def __init__(self, text: str, devices: int):
    self._devices = devices
    self._bodies: dict[str, dict[str, _Instruction]] = {}
    self._roots: dict[str, _Instruction] = {}
    entry, current = "", ""
    for line in text.splitlines():
      if head := _COMPUTATION.match(line):
        current = head["name"]
        self._bodies[current] = {}
        entry = current if head["entry"] else entry
      elif current and (found := _INSTRUCTION.match(line)):
        fields = [found[f] for f in ("name", "shape", "op", "inside", "attributes")]
        self._bodies[current][found["name"]] = instruction = _Instruction(*fields)
        if found["root"]:
          self._roots[current] = instruction
    self._times: dict[str, int] = {}
    self._visit(entry, 1)

  def _visit(self, name: str, times: int) -> None:
    """Counts how often a computation runs; those inside fusions and reductions do not."""
    self._times[name] = self._times.get(name, 0) + times
    for instruction in self._bodies.get(name, {}).values():
      if instruction.op == "fusion" or instruction.op.endswith(("-done", "-update")):
        continue
      if instruction.op in ("while", "call", "conditional", "async-start"):
        trips = self._trips(instruction) if instruction.op == "while" else 1
        callees = _CALLS.findall(instruction.attributes)
        for listed in _BRANCHES.findall(instruction.attributes):
          callees += re.findall(r"%([\w.\-]+)", listed)
        for callee in callees:
          self._visit(callee, times * trips)

  def _trips(self, loop: _Instruction) -> int:
    known = _TRIPS.search(loop.attributes)
    if known:
      return int(known[1])
    # TPU programs do not say. A scan counts from 0 to the one constant in its condition.
    condition = _CONDITION.search(loop.attributes)
    inside = self._bodies.get(condition[1], {}) if condition else {}
    constants = [i.inside for i in inside.values() if i.op == "constant"]
    return int(constants[0]) if len(constants) == 1 and constants[0].isdecimal() else 1

  # --- collectives ---

  def collectives(self) -> dict[str, Traffic]:
    """Traffic of each kind that occurs."""
    totals: dict[str, list[float]] = {}
    for name, times in self._times.items():
      for instruction in self._bodies.get(name, {}).values():
        kind = instruction.op.removesuffix("-start")
        if kind in KINDS:
          size, group = self._payload(kind, instruction), self._group(instruction.attributes)
          share = 1.0 if kind == "collective-permute" else (group - 1) / group
          sent = size * share * (2 if kind == "all-reduce" else 1)
          total = totals.setdefault(kind, [0, 0.0, 0.0])
          for i, value in enumerate((1, size, sent)):
            total[i] += times * value
    return {k: Traffic(int(totals[k][0]), *totals[k][1:]) for k in KINDS if k in totals}

  def _payload(self, kind: str, instruction: _Instruction) -> float:
    sizes = [size for size, _ in _arrays(instruction.shape)]
    group = self._group(instruction.attributes)
    if kind == "reduce-scatter":
      return sum(sizes) * group
    if kind == "collective-permute":  # its start names operand, result and context
      return sizes[0]
    if kind == "all-gather" and instruction.op != kind:  # its start names operands and results
      return sum(sizes) * group / (group + 1)
    return sum(sizes)

  def _group(self, attributes: str) -> int:
    if listed := _GROUP_LISTED.search(attributes):
      return listed[1].count(",") + 1
    if iota := _GROUP_IOTA.search(attributes):
      return int(iota[1])
    if mesh := _GROUP_MESH.search(attributes):
      sizes = dict(_MESH_AXIS.findall(mesh[1]))
      return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return self._devices

  # --- memory traffic ---

  def memory_bytes(self) -> float:
    """Bytes a device moves between memory and cores, if each operation reads and writes once."""
    return sum(
      times * self._moved(body, instruction)
      for name, times in self._times.items()
      for body in (self._bodies.get(name, {}),)
      for instruction in body.values()
    )

  def _moved(self, body: dict[str, _Instruction], i: _Instruction) -> float:
    if i.op in _FREE or i.op.endswith(("-done", "-update")) or "AllocateBuffer" in i.attributes:
      return 0.0
    if i.op.endswith("-start"):  # the result names what is read and what is written
      return i.size
    operands = [body[o] for o in i.operands if o in body]
    if i.op in ("dynamic-slice", "gather", "slice"):
      return 2 * i.size
    if i.op == "dynamic-update-slice":
      return 2 * operands[1].size
    if i.op == "scatter":
      return 2 * operands[-1].size
    if i.op == "fusion":
      callee = _CALLS.search(i.attributes)
      if callee and callee[1] in self._bodies:
        read = sum(self._read(callee[1], n, o.size) for n, o in enumerate(operands))
        return read + sum(map(min, i.sizes, self._written(callee[1])))
    return i.size + sum(o.size for o in operands)

  def _read(self, name: str, number: int, size: float) -> float:
    """Bytes that computation `name` reads of its parameter `number` of `size` bytes."""
    body = self._bodies[name]
    parameter = [i for i in body.values() if i.op == "parameter" and i.inside == str(number)]
    return min(size, self._used(name, parameter[0], size)) if parameter else size

  def _used(self, name: str, source: _Instruction, size: float) -> float:
    total = 0.0
    for user in self._bodies[name].values():
      for n, operand in enumerate(user.operands):
        if operand != source.name:
          continue
        callee = _CALLS.search(user.attributes)
        if user.op in ("dynamic-slice", "gather", "slice") and n == 0:
          total += sum(s for s, _ in _arrays(user.shape))
        elif user.op == "dynamic-update-slice" and n == 0:
          continue  # updated in place
        elif user.op == "bitcast":
          total += self._used(name, user, size)
        elif user.op == "fusion" and callee:
          total += self._read(callee[1], n, size)
        else:
          return size
    return total

  def _written(self, name: str) -> list[float]:
    """Bytes that computation `name` writes of each of its results, wherever they lie."""
    body, root = self._bodies[name], self._roots[name]
    results = [body[o] for o in root.operands] if root.op == "tuple" else [root]
    return [self._result(body, r) for r in results]

  def _result(self, body: dict[str, _Instruction], i: _Instruction) -> float:
    callee = _CALLS.search(i.attributes)
    if i.op == "bitcast" and i.operands[0] in body:
      return self._result(body, body[i.operands[0]])
    if i.op == "dynamic-update-slice":
      return sum(s for s, _ in _arrays(body[i.operands[1]].shape))
    if i.op == "fusion" and callee:
      return sum(self._written(callee[1]))
    return sum(s for s, _ in _arrays(i.shape))
