"""Files, verifier, reset, isolation and errors of a sandbox."""

import os
import pathlib
import subprocess
import threading
import time

import pytest

from rome.envs import owner
from rome.envs.common import BackendUnavailable, ImageError, Limits, SandboxError, SandboxLost
from rome.envs.sandbox import make_sandbox


def test_files_round_trip(sandbox):
  data = bytes(range(256)) * 5000
  sandbox.write_file("deep/er/f.bin", data, mode=0o640)
  assert sandbox.read_file("deep/er/f.bin") == data
  assert sandbox.read_file(f"{sandbox.workdir}/deep/er/f.bin") == data
  listing = sandbox.run("ls -ln deep/er; ls -ld deep").output
  assert "-rw-r-----" in listing and listing.count("Jan  1  2020") == 2
  sandbox.write_file("deep/er/f.bin", b"")
  assert sandbox.read_file("deep/er/f.bin") == b""


def test_directories_up_and_down(sandbox, tmp_path):
  (tmp_path / "a/b").mkdir(parents=True)
  (tmp_path / "a/b/x").write_bytes(b"1")
  (tmp_path / "a/y y").write_bytes(b"2")
  sandbox.upload(tmp_path / "a", "up")
  sandbox.run("ln -s /etc/passwd up/link; mkfifo up/fifo")
  sandbox.download("up", tmp_path / "down")
  found = {str(p.relative_to(tmp_path / "down")) for p in (tmp_path / "down").rglob("*")}
  assert found == {"b", "b/x", "y y"}
  assert (tmp_path / "down/y y").read_bytes() == b"2"
  with pytest.raises(FileExistsError):
    sandbox.download("up", tmp_path / "down")


@pytest.mark.parametrize("path", ["../x", "a/../../x", "", "/", "a\0b"])
def test_paths_that_lead_out_are_refused(sandbox, path):
  with pytest.raises(SandboxError, match="must name something"):
    sandbox.write_file(path, b"")
  with pytest.raises(SandboxError, match="must name something"):
    sandbox.read_file(path)


def test_links_and_special_files_are_refused(sandbox):
  sandbox.run("ln -s /etc/passwd l; ln -s /tmp d; mkfifo p; mkdir dir; echo x > f; ln f hard")
  for path in ("l", "d/x", "p", "dir", "missing"):
    with pytest.raises(SandboxError, match=path):
      sandbox.read_file(path)
  with pytest.raises(SandboxError):
    sandbox.write_file("d/x", b"")
  sandbox.write_file("l", b"new")  # replaces the link itself
  assert sandbox.run("cat l; test -L l || echo plain").output == "newplain\n"
  sandbox.write_file("hard", b"new")
  assert sandbox.run("cat f").output == "x\n"
  with pytest.raises(SandboxError, match="too large|File too large"):
    sandbox.read_file("f", max_bytes=1)
  sandbox.run("truncate -s 20000000 sparse")
  with pytest.raises(SandboxError):
    sandbox.read_file("sparse")


def test_what_rocklet_would_hang_up_on_is_refused_before(sandbox):
  with pytest.raises(SandboxError, match="more than allowed"):
    sandbox.write_file("x" * 5000, b"")
  with pytest.raises(SandboxError, match="more than allowed"):
    sandbox.run(":" * (17 << 20))
  assert sandbox.alive()


def test_names_that_are_no_text(sandbox, tmp_path):
  result = sandbox.run("mkdir n; cd n; echo 1 > $'\\377'; echo 2 > $'a\\nb'; mkdir $'\\376'; cd ..")
  assert result.exit_code == 0
  sandbox.download("n", tmp_path / "n")
  assert {b"\xff", b"a\nb", b"\xfe"} <= set(os.listdir(bytes(tmp_path / "n")))


def test_agent_cannot_read_roots_files(isolated):
  isolated.write_file("secret", b"s3cret", mode=0o600, owner="root")
  result = isolated.run("cat secret; id -u")
  assert "Permission denied" in result.output and "s3cret" not in result.output
  assert result.output.endswith("1000\n")
  assert isolated.read_file("secret") == b"s3cret"


def test_verify_runs_as_root_alone(isolated):
  isolated.write_file("secret", b"ok\n", mode=0o600, owner="root")
  isolated.run("export PATH=/tmp LD_PRELOAD=/x BASH_ENV=/work/evil; cd /tmp; sleep 63 & sleep 64 &")
  isolated.run("echo 'echo evil' > /work/evil; setsid sh -c 'while :; do sleep 0.01; done' &")
  result = isolated.verify(
    "id -u; cat secret; pwd; env | grep -E 'LD|BASH_ENV'; ps -o user,comm; exit 5"
  )
  assert result.exit_code == 5 and not result.timed_out
  head, listing = result.output.split("USER", 1)
  assert head == "0\nok\n/work\n"
  assert "agent" not in listing and "sleep" not in listing
  assert isolated.run("echo next; pwd").output.startswith("next")


def test_verify_is_bounded_and_cleans_up(sandbox):
  start = time.monotonic()
  result = sandbox.verify("echo begun; sleep 60 & sleep 60", timeout=0.3)
  assert result.timed_out and result.exit_code is None and result.output == "begun\n"
  assert time.monotonic() - start < 3
  assert sandbox.verify("sleep 65 & exec >&- 2>&-; sleep 0.1", timeout=5).exit_code == 0
  assert sandbox.stats()["processes"] == 0
  assert sandbox.run("echo next").output == "next\n"


def test_verify_under_a_fork_bomb(isolated):
  isolated.run("b() { b | b & }; b", timeout=1.0)
  time.sleep(0.3)
  result = isolated.verify("echo fine", timeout=20)
  assert (result.exit_code, result.output) == (0, "fine\n")
  assert isolated.run("echo next").output == "next\n"


def test_reset_leaves_no_trace(isolated):
  fresh = "pwd; ls -laR /work /tmp /dev/shm; env; declare -F; ipcs | grep -c 1000; jobs"
  before = isolated.run(fresh).output
  isolated.run(
    "mkdir -p a/b /tmp/t; chmod 000 a; echo x > /tmp/t/.hid; touch /dev/shm/s; chmod 700 .;"
    "sleep 66 &"
  )
  isolated.run("cd /tmp; export V=1; f() { :; }; setsid sleep 67 & head -c 50000 /dev/zero")
  isolated.write_file("rooted/x", b"", mode=0o600, owner="root")
  isolated.reset()
  assert isolated.stats()["processes"] == 1
  assert isolated.run(fresh).output == before


def test_reset_of_a_deep_tree(isolated):
  """Deeper than a path can name, and than a recursion could follow."""
  path = "d/" * 1500
  result = isolated.run(f"p={path}; mkdir -p $p; cd $p; mkdir -p $p; cd $p; touch x")
  assert result.exit_code == 0, result
  isolated.reset()
  assert isolated.run("ls -A").output == ""


def test_reset_forgets_other_sessions(sandbox):
  other = sandbox.session("other")
  other.run("cd /tmp; x=1")
  sandbox.reset()
  assert other.run("echo [$x]; pwd").output.endswith(f"[]\n{sandbox.workdir}\n")
  other.close()


@pytest.mark.slow
def test_backends_show_the_same(sandboxes):
  command = (
    "ls -la /work | grep -v '\\.\\.$'; hostname; id; env | sort; umask; pwd; ls /; find .;"
    "date +%Z; cat /etc/passwd; ls -l a; echo $HOME; ulimit -n; type ls"
  )
  shown = []
  for backend in ("podman", "bubblewrap"):
    box = sandboxes(backend)
    for name in ("c", "a/x", "b", "a/y"):
      box.write_file(name, name.encode())
    first = box.run(command).output
    box.reset()
    for name in ("c", "a/x", "b", "a/y"):
      box.write_file(name, name.encode())
    assert box.run(command).output == first
    shown.append(first)
  assert shown[0] == shown[1]


def test_privileges_of_the_agent(isolated):
  status = isolated.run("cat /proc/self/status").output
  for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
    assert f"{name}:\t0000000000000000" in status
  assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
  assert isolated.run("ip link | grep -c ^[0-9]; ip link").output.startswith("1\n1: lo:")
  assert isolated.run("unshare -U true").exit_code != 0
  for command in ("touch /x", "touch /etc/x", "mount -t tmpfs none /tmp", "ls /run/rome/sock",
                  "chown root /work", "kill -9 1", "echo 1 > /proc/sys/kernel/core_pattern",
                  "mknod /tmp/n c 1 3", "cat /proc/1/environ"):  # fmt: skip
    assert isolated.run(command).exit_code != 0, command


def test_attacks_on_the_kernel_fail(isolated, tmp_path):
  """Some fifty system calls that would be a breach; the program prints those that succeed."""
  program = tmp_path / "attack"
  source = pathlib.Path(__file__).with_name("attack.c")
  subprocess.run(["gcc", "-static", "-o", program, source], check=True)
  isolated.upload(program, "attack")
  assert isolated.run("./attack").output == "done\n"
  assert isolated.run("echo alive").output == "alive\n"


def test_root_inside_cannot_touch_the_kernel(isolated):
  """The verifier runs tests as root, and tests run what the agent wrote."""
  for name in ("kernel/core_pattern", "vm/drop_caches", "kernel/hostname"):
    result = isolated.verify(f"v=$(cat /proc/sys/{name}); echo $v > /proc/sys/{name}")
    assert "Read-only file system" in result.output, name
  assert isolated.verify("mount -t tmpfs none /tmp || unshare -U true || exit 3").exit_code == 3
  assert isolated.verify("touch /dev/x /sys/x /proc/x").exit_code != 0


def test_agent_cannot_end_the_sandbox(isolated):
  assert isolated.run("kill -9 -1; echo").exit_code in (0, 137)
  isolated.run("kill -9 1; killall5 -9; pkill -9 rocklet")
  assert isolated.run("echo still here").output.endswith("still here\n")


@pytest.mark.slow
def test_fork_bomb_is_bounded(isolated):
  result = isolated.run("for i in $(seq 300); do sleep 70 & done; echo done", timeout=3)
  assert isolated.stats()["processes"] <= Limits().pids + 40, result
  isolated.reset()
  assert isolated.run("echo next").output == "next\n"


def test_full_disk(isolated):
  result = isolated.run("dd if=/dev/zero of=big bs=1000000 count=30")
  assert "No space left" in result.output
  assert isolated.run("echo usable; rm big; echo x > y; cat y").output == "usable\nx\n"
  isolated.run("dd if=/dev/zero of=big bs=1000000 count=30")
  with pytest.raises(SandboxError, match="No space left"):
    isolated.write_file("other", b"x" * 100_000)
  assert isolated.run("ls -A").output == "big\ny\n"


@pytest.mark.slow
def test_memory_is_bounded(sandboxes):
  box = sandboxes("podman")
  hog = "v=x; while :; do v=$v$v; done"
  result = box.run(f"bash -c '{hog}'", timeout=30)
  assert result.exit_code not in (0, None)
  assert box.run("echo next").output.endswith("next\n")


def test_memory_is_bounded_by_process(sandboxes):
  result = sandboxes("bubblewrap").run("bash -c 'v=x; while :; do v=$v$v; done'", timeout=30)
  assert result.exit_code not in (0, None) and "cannot allocate" in result.output


@pytest.mark.slow
def test_a_removed_container_is_lost_at_once(sandboxes):
  with make_sandbox(backend="podman") as box:
    failure: list[BaseException] = []

    def wait():
      try:
        box.run("sleep 60", timeout=60)
      except SandboxError as error:
        failure.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    start = time.monotonic()
    subprocess.run(["podman", "rm", "-f", "-t", "0", box.id], check=True, capture_output=True)
    thread.join(timeout=20)
    assert time.monotonic() - start < 10
    assert isinstance(failure[0], SandboxLost) and box.id in str(failure[0])
    assert not box.alive()
    with pytest.raises(SandboxLost):
      box.reset()


def test_close_is_idempotent_and_leaves_nothing():
  box = make_sandbox(backend="bubblewrap")
  home = owner.runtime_dir() / box.id
  assert home.is_dir()
  box.close()
  box.close()
  assert not home.exists()
  with pytest.raises(SandboxLost, match="closed"):
    box.run("true")


def test_errors_name_the_mend():
  with pytest.raises(ValueError, match="'docker' is none of auto, podman"):
    make_sandbox(backend="docker")
  with pytest.raises(BackendUnavailable, match="--sandbox=process --i_accept_no_isolation"):
    make_sandbox(backend="process")
  with pytest.raises(ImageError, match="no images"):
    make_sandbox("x", backend="process", accept_no_isolation=True)
  with pytest.raises(ImageError, match="use backend='podman'"):
    make_sandbox("x", backend="bubblewrap")
  with pytest.raises(ValueError, match="Limits.pids must be an integer of at least 4"):
    Limits(pids=0)


@pytest.mark.slow
def test_unknown_image():
  with pytest.raises(ImageError, match="localhost/no-such-image.*build it first"):
    make_sandbox("localhost/no-such-image", backend="podman")


@pytest.mark.slow
def test_image_without_bash(tmp_path):
  (tmp_path / "empty").write_text("")
  archive, name = tmp_path / "i.tar", "localhost/rome-test-no-bash"
  subprocess.run(["tar", "-cf", archive, "-C", tmp_path, "empty"], check=True)
  subprocess.run(["podman", "import", "-q", archive, name], check=True, capture_output=True)
  try:
    with pytest.raises(ImageError, match=f"{name}' holds no bash"):
      make_sandbox(name, backend="podman")
  finally:
    subprocess.run(["podman", "rmi", "-f", name], check=True, capture_output=True)


def test_missing_backends_say_what_to_install(monkeypatch):
  from rome.envs import sandbox as lib
  from rome.envs.backends.bubblewrap import Bubblewrap
  from rome.envs.backends.podman import Podman

  monkeypatch.setenv("PATH", "/nonexistent")
  monkeypatch.setitem(lib.BACKENDS, "podman", Podman())
  monkeypatch.setitem(lib.BACKENDS, "bubblewrap", Bubblewrap())
  with pytest.raises(BackendUnavailable, match="podman is not installed: .*; or bubblewrap is not"):
    lib._choose("auto")
  assert os.environ["PATH"] == "/nonexistent"
