"""The sandbox in the current directory."""

import argparse
import contextlib
import os
from collections.abc import Iterator

from rome.envs.common import HostDirectory, Limits
from rome.envs.network.policy import NetworkPolicy
from rome.envs.sandbox import Sandbox, make_sandbox

NONE = "none"
KINDS = ("bubblewrap", "podman", NONE)
# What the model is shown of an output hangs on output_bytes, which therefore is that of training.
_LIMITS = Limits(memory_mb=8192, cpus=64.0, pids=4096, disk_mb=2048, open_files=4096)


@contextlib.contextmanager
def open_place(options: argparse.Namespace) -> Iterator[Sandbox]:
  """A sandbox that works in the current directory; see `rome.envs.backends.host`.

  Raises:
    SandboxError: it cannot be had; the message says what to install or change.
    ValueError: options that do not go together.
  """
  backend = "process" if options.sandbox == NONE else options.sandbox
  if backend == "process" and not options.i_accept_no_isolation:
    raise ValueError(
      "--sandbox=none isolates nothing: the agent's commands run as you, on this machine; "
      "if you mean it, add --i_accept_no_isolation"
    )
  if options.image and backend != "podman":
    raise ValueError("--image needs --sandbox=podman")
  network = NetworkPolicy(allow=tuple(options.allow_host)) if options.allow_host else None
  directory = HostDirectory(os.getcwd(), tuple(options.read))
  with make_sandbox(
    options.image or None,
    backend,
    limits=_LIMITS,
    network=network,
    accept_no_isolation=options.i_accept_no_isolation,
    directory=directory,
  ) as sandbox:
    yield sandbox
