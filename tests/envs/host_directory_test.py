"""A sandbox in a directory of the user's: what it may do there, and what of the machine it sees."""

import os
import pathlib
import subprocess
import threading

import pytest

from rome.envs import HostDirectory, Limits, NetworkPolicy, SandboxError, make_sandbox
from tests.agent.raw_server import serving, whole

LIMITS = Limits(pids=500, disk_mb=64)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
  path = tmp_path_factory.mktemp("project")
  subprocess.run(["git", "init", "-q", path], check=True)
  (path / "mine.txt").write_text("mine\n")
  return path


@pytest.fixture(scope="module")
def sandbox(project):
  with make_sandbox(
    backend="bubblewrap", limits=LIMITS, directory=HostDirectory(str(project))
  ) as made:
    yield made


def test_it_works_there_as_the_caller_and_files_stay(sandbox, project):
  done = sandbox.run("pwd; cat mine.txt; echo new > made.txt; mkdir d; git status --short", 30)
  assert done.output.split() == [str(project), "mine", "??", "made.txt", "??", "mine.txt"]
  sandbox.write_file("d/by_file.txt", b"x")
  for name in ("made.txt", "d/by_file.txt"):
    stat = (project / name).stat()
    assert (stat.st_uid, stat.st_gid) == (os.getuid(), os.getgid())
    assert stat.st_mtime > (project / "mine.txt").stat().st_mtime - 1
  assert sandbox.read_file("mine.txt") == b"mine\n"


@pytest.mark.parametrize(
  "command",
  [
    "touch /usr/rome-was-here",
    "touch /etc/rome-was-here",
    "for place in / /run /var /dev; do touch $place/x && exit; done; false",
    "test $(df -k --output=size /dev/shm | tail -1) -gt 1048576",
    "cat /etc/shadow",
    "chmod 600 /dev/null",
    "echo x > .git/config",
    "touch .git/hooks/pre-commit",
    "mv .git elsewhere",
    "ls -A $HOME | grep .",
    "mount -t tmpfs x /tmp",
    "exec 3<>/dev/tcp/1.1.1.1/80",
    "kill -9 1 && ! ls /proc/1",
    "echo 1 > /proc/sys/kernel/panic",
    "grep -v '^0*$' <(sed -n 's/^Cap[PEB].*:\\t//p' /proc/self/status)",
  ],
)
def test_what_it_may_not(sandbox, command):
  assert sandbox.run(command, 10).exit_code not in (0, None)


def test_nothing_empties_or_copies_the_directory(sandbox, project):
  for what in (sandbox.reset, sandbox.snapshot, lambda: sandbox.commit("x")):
    with pytest.raises(SandboxError, match="which it keeps"):
      what()
  sandbox.verify("true")
  assert (project / "mine.txt").read_text() == "mine\n"


def test_the_environment_has_no_home_and_readable_places(tmp_path, monkeypatch):
  (tmp_path / "work").mkdir()
  tool = tmp_path / "tools" / "greet"
  tool.parent.mkdir()
  tool.write_text("#!/bin/sh\necho hello\n")
  tool.chmod(0o755)
  monkeypatch.setenv("PATH", f"{tool.parent}:/nowhere:/usr/bin")
  directory = HostDirectory(str(tmp_path / "work"), readable=(str(tool.parent),))
  with make_sandbox(backend="bubblewrap", limits=LIMITS, directory=directory) as made:
    assert made.run("greet").output == "hello\n"
    assert made.run(f"touch {tool.parent}/x").exit_code
    assert made.run("echo $PATH").output == f"{tool.parent}:/usr/bin:/usr/local/bin:/bin\n"


@pytest.mark.parametrize(
  "path", ["/", "~", "/tmp", "/usr/share", "/etc", "/nowhere/at/all", "~/.rome", "~/.ssh/x"]
)
def test_places_that_are_refused(path, tmp_path, monkeypatch):
  if path.startswith("~/"):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / path[2:]).mkdir(parents=True)
  path = os.path.expanduser(path)
  with pytest.raises(SandboxError, match="workdir"):
    make_sandbox(backend="bubblewrap", limits=LIMITS, directory=HostDirectory(path))


def test_what_names_another_repository_stays(tmp_path):
  (tmp_path / ".git").write_text("gitdir: /nowhere\n")
  directory = HostDirectory(str(tmp_path))
  with make_sandbox(backend="bubblewrap", limits=LIMITS, directory=directory) as made:
    for command in ("echo x > .git", "rm .git", "mv .git x", "mv x .git; mkdir .git"):
      assert made.run(command).exit_code, command
  (tmp_path / ".git").unlink()
  (tmp_path / ".git").symlink_to("x")
  with pytest.raises(SandboxError, match="is a link"):
    make_sandbox(backend="bubblewrap", limits=LIMITS, directory=directory)


def test_hooks_cannot_be_made_where_there_are_none(tmp_path):
  subprocess.run(["git", "init", "-q", "--template=", tmp_path], check=True)
  directory = HostDirectory(str(tmp_path))
  with make_sandbox(backend="bubblewrap", limits=LIMITS, directory=directory) as made:
    assert made.run("mkdir -p .git/hooks; touch .git/hooks/pre-commit").exit_code


def test_without_isolation_it_keeps_the_directory_too(tmp_path):
  (tmp_path / "mine.txt").write_text("mine")
  directory = HostDirectory(str(tmp_path))
  with make_sandbox(backend="process", directory=directory, accept_no_isolation=True) as made:
    assert made.workdir == os.path.realpath(tmp_path)
    assert made.run("cat mine.txt; echo y > new").output == "mine"
  assert pathlib.Path(tmp_path, "new").read_text() == "y\n"


def test_a_policy_opens_one_way_out(tmp_path):
  with serving(whole("hi")) as server:
    port = int(server.url.split(":")[2].split("/")[0])
    made = make_sandbox(
      backend="bubblewrap",
      network=NetworkPolicy(forward={8080: ("127.0.0.1", port)}),
      directory=HostDirectory(str(tmp_path)),
    )
    with made:
      ask = "exec 3<>/dev/tcp/127.0.0.1/%d; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; head -1 <&3"
      assert made.run(ask % 8080).output.startswith("HTTP/1.1 200")
      assert "Connection refused" in made.run(ask % port).output


@pytest.mark.slow
def test_in_a_container_files_are_the_callers_too(tmp_path):
  subprocess.run(["git", "init", "-q", tmp_path], check=True)
  with make_sandbox(backend="podman", directory=HostDirectory(str(tmp_path))) as made:
    assert made.run("pwd; mkdir d; echo x > d/new; echo $HOME").output == "/work\n/tmp\n"
    made.write_file("by_file", b"x")
    for bad in (
      "echo x >> .git/config",
      "mv .git x",
      "echo 1 > /proc/sys/kernel/panic",
      "chmod 600 /dev/null",
      "grep -v '^0*$' <(sed -n 's/^Cap[PEB].*:\\t//p' /proc/self/status)",
    ):
      assert made.run(bad).exit_code, bad
  for name in ("d/new", "by_file"):
    assert (tmp_path / name).stat().st_uid == os.getuid()


def test_a_command_can_be_interrupted(sandbox):
  event = threading.Event()
  sandbox.interrupt_with(event)
  threading.Timer(0.5, event.set).start()
  result = sandbox.run("here=1; echo begun; sleep 60", 100)
  assert result.timed_out and result.output == "begun\n" and result.duration < 30
  event.clear()
  assert sandbox.run("echo $here; sleep 0.3").output == "1\n"
  sandbox.interrupt_with(None)
