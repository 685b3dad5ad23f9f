"""Rocklet on this machine's file system, in a network namespace that the test makes itself.

So programs of the machine (curl, python3) run as an agent's, and "outside" addresses exist without
anything that could leave: 192.0.2.1 and 2001:db8::1 (of the documentation ranges) are addresses of
the namespace's own loopback device.
"""

import contextlib
import sys

from rome.envs.backends.process import PlainProcess
from rome.envs.common import Limits
from rome.envs.sandbox import Sandbox

PYTHON = sys.executable
_SETUP = (
  "ip link set lo up && ip addr add 192.0.2.1/32 dev lo && "
  'ip addr add 2001:db8::1/128 dev lo && exec "$0" "$@"'
)
PREFIX = ("unshare", "--net", "sh", "-c", _SETUP)


def namespaced():
  return Sandbox(PlainProcess(PREFIX), None, Limits(pids=4096))


@contextlib.contextmanager
def served(policy):
  """A sandbox in such a namespace, and its egress by a policy; no file of the machine changes."""
  with namespaced() as sandbox:
    sandbox._link.serve(policy)
    yield sandbox
