"""What every part of the sandbox code shares: results, limits and errors.

Kept apart from `sandbox.py` so that the backends can use them without importing it.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from rome.envs.network import NetworkPolicy


class SandboxError(RuntimeError):
  """Something about a sandbox went wrong; the message names the thing and the mend."""


class SandboxLost(SandboxError):
  """The sandbox died. This is infrastructure: it never becomes a reward of zero."""


class BackendUnavailable(SandboxError):
  """The backend cannot run on this machine; the message says what to install."""


class ImageError(SandboxError):
  """The image is unknown, fails to build or lacks what a sandbox needs."""


@dataclasses.dataclass(frozen=True)
class CommandResult:
  """What one command did.

  Attributes:
    exit_code: status as bash counts it (128 + signal if killed); None if the time ran out.
    output: stdout and stderr in the order written, UTF-8 with replacement. A long one keeps its
      head and its tail; the line between says how much is left out and which file has it all.
    timed_out: the command was stopped at its deadline; the session lives on.
    truncated: output was longer than `Limits.output_bytes`.
    duration: seconds, measured on the host.
  """

  exit_code: int | None
  output: str
  timed_out: bool
  truncated: bool
  duration: float


@dataclasses.dataclass(frozen=True)
class Limits:
  """Upper bounds of one sandbox.

  Podman holds memory, cpus and pids with a cgroup for the whole sandbox. Bubblewrap has none: there
  memory_mb bounds the address space of each process, pids the processes of the agent's user, and
  cpus is not enforced.

  Attributes:
    memory_mb: MiB of memory, tmpfs included (no swap).
    cpus: share of processors.
    pids: processes and threads of the agent.
    disk_mb: MiB that the sandbox may write, in all places together; /dev/shm has as much again,
      and so have shared memory segments.
    open_files: descriptors of one process.
    output_bytes: bytes of a command's output that are kept in its result.
  """

  memory_mb: int = 256
  cpus: float = 1.0
  pids: int = 64
  disk_mb: int = 16
  open_files: int = 1024
  output_bytes: int = 16384

  def __post_init__(self) -> None:
    least = {"memory_mb": 16, "pids": 4, "disk_mb": 1, "open_files": 256, "output_bytes": 64}
    for name, low in least.items():
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"Limits.{name} must be an integer of at least {low}, not {value!r}")
    if isinstance(self.cpus, bool) or not isinstance(self.cpus, int | float) or self.cpus < 0.01:
      raise ValueError(f"Limits.cpus must be a number of at least 0.01, not {self.cpus!r}")


@dataclasses.dataclass(frozen=True)
class HostDirectory:
  """A directory of the user's that a sandbox works in, in the place of one of its own.

  What the agent writes there stays, and belongs to the caller. Such a sandbox is never emptied, and
  has neither snapshots nor forks.

  Attributes:
    path: the directory.
    readable: bubblewrap: further paths of the host that are shown, read-only.
  """

  path: str
  readable: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class SandboxSpec:
  """What to start. Equal specs are interchangeable, so a warm sandbox of one serves the other.

  Attributes:
    image: a local image; None for the base image.
    backend: "podman", "bubblewrap", or "auto".
    limits: upper bounds.
    network: what may be reached from inside; None: nothing.
    labels: names and values for the reader.
    ttl: seconds after which it is stopped, however busy.
    idle_ttl: seconds without use after which it is stopped.
  """

  image: str | None = None
  backend: str = "auto"
  limits: Limits = Limits()
  network: "NetworkPolicy | None" = None
  labels: tuple[tuple[str, str], ...] = ()
  ttl: float = 3600.0
  idle_ttl: float = 600.0

  def __post_init__(self) -> None:
    for name in ("ttl", "idle_ttl"):
      if not getattr(self, name) > 0:
        raise ValueError(f"SandboxSpec.{name} must be more than 0, not {getattr(self, name)!r}")
