"""Plays attacks, each on a sandbox that is new or reset, and judges them.

An attack ends as "contained", with the reason that the product reported, or as "BREACH", with what
was seen. A sandbox that ends in an attack is contained if its loss is declared with a reason; the
next attack gets another.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable

from experiments.isolation_attacks import policy
from experiments.isolation_attacks import witness as witness_lib
from experiments.isolation_attacks.attack import Attack, Scene, reason
from experiments.isolation_attacks.canaries import Canaries
from experiments.isolation_attacks.neighbours import Neighbours
from rome.envs import rocklet
from rome.envs.sandbox import Limits, Sandbox, SandboxError, SandboxLost, make_sandbox

LIMITS = Limits(memory_mb=256, cpus=1.0, pids=64, disk_mb=16)
_GOT = re.compile(r"^GOT .*", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How one attack by one user ended.

  Attributes:
    name, category, language, user: of the attack.
    verdict: "contained" or "BREACH".
    reason: why it led nowhere, as the product reported it.
    evidence: what was seen that must not be.
    seconds: the attack took.
  """

  name: str
  category: str
  language: str
  user: str
  verdict: str
  reason: str
  evidence: tuple[str, ...]
  seconds: float


@functools.cache
def payload() -> pathlib.Path:
  """The compiled payload, in a directory that lives as long as the process.

  Raises:
    RuntimeError: it does not compile.
  """
  source = pathlib.Path(__file__).with_name("payload.c")
  version = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
  directory = rocklet.cache_dir() / "attacks"
  directory.mkdir(exist_ok=True)
  with tempfile.TemporaryDirectory(dir=directory) as scratch:
    made = pathlib.Path(scratch) / "payload"
    command = ["gcc", "-O1", "-static", "-pthread", "-s", "-o", str(made), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
      raise RuntimeError(f"{source.name} does not compile: {done.stderr.strip()[:300]}")
    return made.replace(directory / f"payload-{version}")  # another checkout may have another


class Range:
  """Where attacks are played: the sandbox under attack, its neighbours, the canaries.

  Attributes:
    languages: that the image can run.
    replaced: how many sandboxes ended under attack.
  """

  def __init__(self, backend: str, image: str | None, neighbours: Neighbours, canaries: Canaries):
    self._backend, self._image = backend, image
    self._neighbours, self._canaries = neighbours, canaries
    self._sandbox: Sandbox | None = None
    self._judge: Sandbox | None = None
    self._stack = contextlib.ExitStack()
    self._allowed = self._stack.enter_context(policy.server())
    self._with_policy = False
    self.replaced = 0
    present = self.sandbox().run("type python3 node").output
    self.languages = {"shell", "c", "host"}
    self.languages |= {
      name
      for name, program in (("python", "python3 is"), ("node", "node is"))
      if program in present
    }

  def __enter__(self) -> "Range":
    return self

  def __exit__(self, *_: object) -> None:
    for sandbox in (self._sandbox, self._judge):
      if sandbox is not None:
        sandbox.close()
    self._stack.close()

  def sandbox(self, with_policy: bool = False) -> Sandbox:
    """An empty sandbox with the payload in /tmp."""
    if self._sandbox is not None and with_policy != self._with_policy:
      self._sandbox.close()
      self._sandbox = None
    if self._sandbox is not None:
      try:
        self._sandbox.reset()
      except SandboxError:
        self._retire()
    if self._sandbox is None:
      network = policy.policy(self._allowed) if with_policy else None
      self._sandbox = make_sandbox(self._image, self._backend, limits=LIMITS, network=network)
      self._with_policy = with_policy
    self._sandbox.write_file("/tmp/payload", payload().read_bytes(), mode=0o755)
    return self._sandbox

  def judge(self) -> Sandbox:
    """A second sandbox of the image; it holds whatever was put there before."""
    if self._judge is not None and not self._judge.alive():
      self._judge.close()
      self._judge = None
    if self._judge is None:
      self._judge = make_sandbox(self._image, self._backend, limits=LIMITS)
    return self._judge

  def _retire(self) -> None:
    if self._sandbox is not None:
      self._sandbox.close()
      self._sandbox = None
      self.replaced += 1

  def play(self, attack: Attack, user: str) -> Outcome:
    """Plays one attack and judges it."""
    sandbox = self.sandbox(attack.needs_policy)
    scene = Scene(
      sandbox, user, self._neighbours.sandboxes[0], self._canaries, LIMITS, self.judge,
      self._allowed,
    )  # fmt: skip
    harmed = len(self._neighbours.errors)
    assert sandbox._launched is not None
    pid = sandbox._launched.pid
    kills = witness_lib.out_of_memory(pid)
    error: SandboxError | None = None
    evidence: list[str] = []
    start = time.monotonic()
    with witness_lib.Witness(sandbox, self._canaries, user, LIMITS) as witness:
      try:
        attack.play(scene)
      except SandboxError as failure:
        error = failure
      except Exception as failure:  # the product owes its callers a SandboxError
        evidence.append(f"undeclared {type(failure).__name__}: {failure}")
      seconds = time.monotonic() - start
      oom = witness_lib.out_of_memory(pid) > kills
      evidence += witness.conclude()
    error = self._health(scene, error, evidence)
    evidence += _claims(scene)
    evidence += self._neighbours.errors[harmed:]
    return Outcome(
      attack.name, attack.category, attack.language, user,
      "BREACH" if evidence else "contained", reason(scene, error, oom),
      tuple(dict.fromkeys(evidence)), round(seconds, 3),
    )  # fmt: skip

  def _health(
    self, scene: Scene, error: SandboxError | None, evidence: list[str]
  ) -> SandboxError | None:
    """After an attack a sandbox works again after a reset, or says that it is lost, and why."""
    try:
      scene.reset()
      result = scene.sandbox.run("echo well-$((20 + 3))", timeout=20)
      if result.output != "well-23\n" or result.exit_code != 0:
        evidence.append(
          f"after the reset a command gave {result.exit_code}, {result.output[:100]!r}"
        )
    except SandboxLost as failure:
      error = failure
    except SandboxError as failure:
      evidence.append(f"neither lost nor well: {failure}")
    if isinstance(error, SandboxLost):
      if not str(error).partition(": ")[2].strip():
        evidence.append(f"lost without a reason: {error}")
      self._retire()
    return error


def _claims(scene: Scene) -> list[str]:
  outputs = [result.output for result in scene.results]
  found = [*scene.claims, *(line for output in outputs for line in _GOT.findall(output))]
  if any(scene.canaries.secret in output for output in outputs):
    found.append("the secret of the canary was read")
  return found


def play_all(
  attacks: Iterable[Attack], where: Range, tell: Callable[[Outcome], None] = lambda outcome: None
) -> tuple[list[Outcome], list[str]]:
  """Plays each attack as each of its users.

  Returns:
    The outcomes, and the names of attacks whose language the image lacks.
  """
  outcomes, missing = [], []
  for attack in attacks:
    if attack.language not in where.languages:
      missing.append(f"{attack.name} ({attack.language})")
      continue
    for user in attack.users:
      outcomes.append(where.play(attack, user))
      tell(outcomes[-1])
  return outcomes, missing
