"""What a sandbox with a policy leaves in this process: nothing.

Alone in its file, as another sandbox that still lives would keep the thread.
"""

import contextlib
import os
import threading
import time

from rome.envs import make_sandbox
from rome.envs.network.policy import NetworkPolicy
from tests.envs.network.servers import echo


def test_nothing_is_left_behind():
  """Threads, descriptors and sockets go with the last sandbox that has a policy."""

  def descriptors():
    links = []
    for fd in os.listdir("/proc/self/fd"):
      with contextlib.suppress(OSError):  # that of the listing itself
        links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return {link for link in links if "socket" in link or "eventpoll" in link}

  with make_sandbox(backend="bubblewrap"):
    pass  # what the first sandbox of a process opens for good
  before = descriptors()
  with echo() as port:
    policy = NetworkPolicy(allow=(f"localhost:{port}", f"127.0.0.1:{port}", "*.allowed.test:443"))
    for _ in range(3):
      with make_sandbox(backend="bubblewrap", network=policy) as sandbox:
        sandbox.run(f"nslookup x.allowed.test; exec 3<>/dev/tcp/127.77.0.1/{port}; echo x >&3")
        assert "egress" in {thread.name for thread in threading.enumerate()}
  deadline = time.monotonic() + 10  # the servers of the test end their sockets in their own time
  while descriptors() - before and time.monotonic() < deadline:
    time.sleep(0.05)
  assert descriptors() - before == set()
  assert "egress" not in {thread.name for thread in threading.enumerate()}
