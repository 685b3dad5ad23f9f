"""One attack, and the scene it plays in."""

import dataclasses
import re
from collections.abc import Callable

from experiments.isolation_attacks.canaries import Canaries
from rome.envs.sandbox import CommandResult, Limits, Sandbox, SandboxError, SandboxLost

USERS = ("agent", "root")
# What the product says, as the report words it; the first that is found names the reason.
_REASONS = (
  (r"no new process could start", "fork bomb ended: process limit"),
  (r"[Oo]ut of memory|Cannot allocate|MemoryError|heap out of memory|bad_alloc", "out of memory"),
  (r"No space left|Disk quota", "disk full"),
  (r"annot fork|can't fork|fork: retry|temporarily unavailable|EAGAIN", "process limit (EAGAIN)"),
  (r"Too many open files|EMFILE", "descriptor limit (EMFILE)"),
  (r"File too large|EFBIG", "file size limit (EFBIG)"),
  (r"Operation not permitted|EPERM", "refused (EPERM)"),
  (r"Permission denied|EACCES", "refused (EACCES)"),
  (r"Read-only file system|EROFS", "refused (EROFS)"),
  (r"Address family not supported|EAFNOSUPPORT", "refused (EAFNOSUPPORT)"),
  (r"Function not implemented|ENOSYS", "refused (ENOSYS)"),
  (r"Connection refused|ECONNREFUSED", "nobody there (ECONNREFUSED)"),
  (r"[Nn]o such file|nonexistent|not found|ENOENT|No such process|cannot access", "not there"),
  (r"Invalid argument|EINVAL", "refused (EINVAL)"),
)


@dataclasses.dataclass
class Scene:
  """What an attack can use.

  Attributes:
    sandbox: the one under attack, new or reset, with /tmp/payload and the canaries' names.
    user: "agent" or "root".
    neighbour: another sandbox, at work.
    canaries: of the host.
    results: of the commands run so far.
    claims: successes that the attack's own code noticed; each is a breach.
    make_judge: makes, or brings, a sandbox of the same image, which may hold anything.
    allowed: port of the server that a policy allows, where the attack needs one.
  """

  sandbox: Sandbox
  user: str
  neighbour: Sandbox
  canaries: Canaries
  limits: Limits
  make_judge: Callable[[], Sandbox] | None = None
  allowed: int = 0
  results: list[CommandResult] = dataclasses.field(default_factory=list)
  claims: list[str] = dataclasses.field(default_factory=list)
  note: str = ""
  _session: object = None

  def run(self, command: str, timeout: float = 5.0) -> str:
    """Runs a command as the attacking user; returns its output."""
    text = self.fill(command)
    if self.user == "agent":
      result = self.sandbox.run(text, timeout)
    else:
      result = self.as_root(text, timeout)
    self.results.append(result)
    return result.output

  def as_root(self, command: str, timeout: float = 5.0) -> CommandResult:
    """As root inside: a session of root's, or the verifier where there is no such session yet."""
    try:
      if self._session is None:
        self._session = self.sandbox.session("attack", user="root")  # type: ignore[call-arg]
      return self._session.run(command, timeout)  # type: ignore[attr-defined]
    except TypeError:
      return self.sandbox.verify(command, timeout)

  def fill(self, text: str) -> str:
    """Puts the canaries' names in the place of `{token}` and the like."""
    names = {
      "token": self.canaries.token, "canary": self.canaries.file, "port": self.canaries.port,
      "directory": self.canaries.directory, "abstract": self.canaries.abstract,
      "service": self.canaries.path, "disk": self.canaries.disk, "handle": self.canaries.handle,
      "hostpid": self.canaries.pid, "allowed": self.allowed,
    }  # fmt: skip
    return re.sub(r"\{(\w+)\}", lambda m: str(names.get(m[1], m[0])), text)

  def fill_bytes(self, data: bytes) -> bytes:
    return self.fill(data.decode("latin-1")).encode("latin-1")

  def judge(self) -> Sandbox:
    """The judge's sandbox, where nothing of the agent ever ran."""
    assert self.make_judge is not None
    return self.make_judge()

  def claim(self, what: str) -> None:
    self.claims.append(what)

  def expect(self, condition: bool, what: str) -> None:
    """Claims `what` unless the condition holds."""
    if not condition:
      self.claim(what)

  def reset(self) -> None:
    if self._session is not None:
      self._session = None
    self.sandbox.reset()


Play = Callable[[Scene], None]


@dataclasses.dataclass(frozen=True)
class Attack:
  """An attack: `play` runs it, the witness and the scene's claims judge it.

  Attributes:
    name, category: for the report.
    language: "shell", "c", "python", "node", or "host" where it is played against the host's calls.
    users: who attacks.
    quick: in the subset that every test run plays.
    needs_policy: the sandbox has a network policy (policy.py).
  """

  name: str
  category: str
  language: str
  play: Play
  users: tuple[str, ...] = USERS
  quick: bool = False
  needs_policy: bool = False


def command(
  name: str, category: str, language: str, text: str, *, timeout: float = 3.0,
  users: tuple[str, ...] = USERS, quick: bool = False,
) -> Attack:  # fmt: skip
  """An attack that is one command. `GOT` at the start of a line of its output is a claim."""

  def play(scene: Scene) -> None:
    scene.run(text, timeout)

  return Attack(name, category, language, play, users, quick)


def c(name: str, category: str, arguments: str, **options: object) -> Attack:
  """A command of the compiled payload."""
  return command(name, category, "c", f"/tmp/payload {arguments}", **options)  # type: ignore[arg-type]


def python(name: str, category: str, code: str, **options: object) -> Attack:
  text = f"python3 - <<'PAYLOAD'\n{code}\nPAYLOAD"
  return command(name, category, "python", text, **options)  # type: ignore[arg-type]


def node(name: str, category: str, code: str, **options: object) -> Attack:
  text = f"cat > /tmp/p.js <<'PAYLOAD'\n{code}\nPAYLOAD\nnode /tmp/p.js"
  return command(name, category, "node", text, **options)  # type: ignore[arg-type]


def reason(scene: Scene, error: SandboxError | None, oom: bool) -> str:
  """Why an attack led nowhere, as the product reported it."""
  parts = []
  if error is not None:
    kind = "sandbox lost" if isinstance(error, SandboxLost) else "refused"
    text = str(error).partition(": ")[2] or str(error)
    parts.append(f"{kind}: {text[:100]}")
  if oom:
    parts.append("out of memory: process killed")
  if any(result.timed_out for result in scene.results):
    parts.append("timed out")
  output = "\n".join(result.output for result in scene.results)
  parts += [label for pattern, label in _REASONS if re.search(pattern, output)][:2]
  if any(result.exit_code == 137 for result in scene.results) and not oom:
    parts.append("killed")
  if any(result.truncated for result in scene.results):
    parts.append("output cut to its limit")
  if scene.note:
    parts.append(scene.note)
  return "; ".join(dict.fromkeys(parts)) or "no effect outside"
