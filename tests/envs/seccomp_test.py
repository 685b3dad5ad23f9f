"""The system call filter by itself, for root of a user namespace, and that normal programs run."""

import errno
import os
import pathlib
import shutil
import subprocess

import pytest

from rome.envs.backends.process import PlainProcess
from rome.envs.common import Limits
from rome.envs.sandbox import Sandbox

NAMESPACES = ("unshare", "--user", "--map-root-user", "--mount", "--net", "--uts", "--ipc")
THROUGH = {
  "clone", "prlimit64_read", "prlimit64_own", "prlimit64_other_read", "personality",
  "personality_no_randomize", "ioctl", "ptrace", "process_vm_readv", "socket_unix", "socket_inet",
  "socket_inet6", "socket_netlink", "socketpair_unix", "done",
}  # fmt: skip
MISSING = {"clone3", "io_uring_setup", "io_uring_enter", "io_uring_register"}
NO_FAMILY = {"socket_packet", "socket_vsock", "socket_alg", "socketpair_tipc"}


def probe(tmp_path):
  source, binary = pathlib.Path(__file__).parent / "probe.c", tmp_path / "probe"
  subprocess.run(["gcc", "-static", "-Wall", "-Werror", "-o", binary, source], check=True)
  return binary


def table(text):
  return {name: int(number) for name, number in (line.split() for line in text.splitlines())}


def expected(name):
  if name in THROUGH:
    return 0
  return (
    errno.ENOSYS if name in MISSING else errno.EAFNOSUPPORT if name in NO_FAMILY else errno.EPERM
  )


def test_the_filter_alone_stops_root_of_a_user_namespace(tmp_path):
  """The same calls by the same root without the filter show what the filter is worth."""
  binary = probe(tmp_path)
  bare = subprocess.run([*NAMESPACES, binary], capture_output=True, text=True, check=True)
  unfiltered = table(bare.stdout)
  with Sandbox(PlainProcess(NAMESPACES), None, Limits()) as sandbox:
    sandbox.write_file("probe", binary.read_bytes(), mode=0o755)
    result = sandbox.run("./probe", timeout=30)
  filtered = table(result.output)
  assert filtered == {name: expected(name) for name in unfiltered}
  opened = {name for name, number in unfiltered.items() if not number and filtered[name]}
  assert {"unshare", "unshare_newuts", "chroot", "clone_newuser", "clone_newpid"} <= opened
  assert len(unfiltered) > 75


def test_the_filter_in_a_sandbox(isolated, tmp_path):
  """As the agent and as the verifier's root."""
  isolated.write_file("probe", probe(tmp_path).read_bytes(), mode=0o755)
  for output in (isolated.run("./probe", 30).output, isolated.verify("./probe", 30).output):
    refused = {name: number for name, number in table(output).items() if number}
    by_podman = {"personality_no_randomize"}  # its own filter knows fewer values
    assert set(refused) - by_podman == set(table(output)) - THROUGH
    assert table(output)["done"] == 0


PROGRAMS = {
  "bash": ("echo $(echo a | cat; (exit 3) || echo $?)", "a 3"),
  "python3": ("python3 -c 'import subprocess, threading; threading.Thread(target=print, args=(1,))"
              ".start(); print(subprocess.check_output([\"echo\", \"x\"]))'", "1\nb'x\\n'"),
  "node": ("node -e 'require(\"child_process\").exec(\"echo y\", (e, o) => console.log(e, o))'",
           "null y"),
  "gcc": ("echo 'int main(void) { return 7; }' > a.c; gcc a.c && ./a.out; echo $?", "7"),
  "git": ("git init -q r && cd r && git -c user.name=a -c user.email=b commit -q --allow-empty -m m"
          " && git log --format=%s", "m"),
  "java": ("printf 'class A { public static void main(String[] a) { Thread t = new Thread(() -> "
           "System.out.println(6 * 7)); t.start(); } }' > A.java; java A.java", "42"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_normal_programs_run(program):
  """On this machine's own file system, as far as it has them; bash it has."""
  if not shutil.which(program):
    pytest.skip(f"{program} is not installed")
  command, output = PROGRAMS[program]
  path = f"export PATH=$PATH:{os.environ['PATH']}; "
  with Sandbox(PlainProcess(("unshare", "--net")), None, Limits(pids=4096)) as sandbox:
    result = sandbox.run(path + command, timeout=60)
  assert result.output.strip() == output, result
