"""The writable root: what is in it, its limit, its reset, and that nobody leaves it."""

import os
import pathlib
import subprocess
import threading
import time

import pytest

from rome.envs.backends import podman_spec
from rome.envs.common import BackendUnavailable, Limits, SandboxError, SandboxLost
from rome.envs.sandbox import make_sandbox


def test_root_writes_everywhere_and_a_reset_undoes_it(isolated):
  # Summed up, as a long output would be put into a file below /tmp meanwhile.
  places = "bin etc root run sbin tmp usr var work dev/shm"
  listing = f"cd /; (ls -laR {places}; ls -la / | grep -v proc) | sha256sum"
  before = isolated.run(listing, timeout=30).output
  done = isolated.verify(
    "set -e; echo x > /etc/new; rm /etc/passwd; rm -r /usr; mkdir /usr; touch /usr/a; mv /bin /b;"
    "/b/ln -s /nowhere /bin; PATH=/b; chmod 700 /root; rm -rf /tmp; mkdir -p /run/rome; echo done"
  )
  assert done.output == "done\n"
  isolated.reset()
  assert isolated.run(listing, timeout=30).output == before


def test_one_limit_for_all_places(isolated):
  disk = Limits().disk_mb
  script = f"""
    for place in /work /tmp /etc /var; do
      dd if=/dev/zero of=$place/big bs=1048576 count={disk // 4 + 1} 2>&1
    done | grep -c 'No space left'
    dd if=/dev/zero of=/dev/shm/big bs=1048576 count={disk + 1} 2>&1 | grep -c 'No space left'
    echo $(cat /work/big /tmp/big /etc/big /var/big | wc -c) $(wc -c < /dev/shm/big)
  """
  rows = isolated.verify(script).output.split()
  assert rows[:2] == ["1", "1"]
  assert int(rows[2]) <= disk << 20 and int(rows[3]) == disk << 20
  inodes = "i=0; while : > n$i; do i=$((i + 1)); done 2>/dev/null; echo $i"
  isolated.reset()
  assert 1000 < int(isolated.run(inodes, timeout=60).output) <= disk * 256 + 4096


def test_other_places_are_read_only_for_root_too(isolated):
  script = """
    for place in / /proc /sys /dev $(cut -d' ' -f2 /proc/mounts); do
      [ -d "$place" ] && (: > "$place/written") 2>/dev/null && echo "$place"
    done | sort -u | tr '\\n' ' '
  """
  # mqueue holds no bytes: the rlimit for it is zero, and an attempt says "too many open files".
  assert isolated.verify(script).output == "/ /dev/shm "


def test_root_inside_has_no_way_out(isolated):
  script = """
    for path in /proc/1/root/etc /proc/1/cwd/etc /proc/1/fd/3 /proc/1/mem /proc/1/environ \
        /proc/1/task/1/root/etc /proc/1/map_files/x /proc/1/ns/mnt; do
      cat "$path" >/dev/null 2>&1 && echo "read $path"
      ls "$path/" >/dev/null 2>&1 && echo "listed $path"
    done
    echo 900 > /proc/1/oom_score_adj && echo adjusted
    chroot / true && echo chroot
    mount -t tmpfs none /tmp && echo mount
    umount /proc && echo umount
    unshare -m true && echo unshare
    mknod /tmp/node c 1 3 && echo mknod
    ls -A /run
    grep -c /run/rome /proc/mounts
  """
  # The overlay's own line names its layers, and nothing else does.
  assert isolated.verify(f"({script}) 2>/dev/null").output == "1\n"


@pytest.mark.slow
def test_root_inside_is_nobody_outside(sandboxes):
  sandbox = sandboxes("podman")
  ids = ["0", str(podman_spec.first_id(sandbox.id)), "65536"]
  assert sandbox.run("cat /proc/self/uid_map").output.split() == ids


def test_the_home_of_tests_is_empty(isolated):
  isolated.run("echo 'exit 0' > ~/.profile; mkdir ~/.config")
  before = isolated.snapshot().digest
  for _ in range(2):  # the second one is after root, too
    assert isolated.verify("cd ~; pwd; ls -A; touch left; stat -c %u:%a .").output == (
      "/.rome-home\n0:700\n"
    )
  assert isolated.verify("true").exit_code == 0 and isolated.snapshot().digest == before
  root = isolated.session("root", user="root")
  root.run("mkdir /.rome-home; echo x > /.rome-home/.profile; ln -s /work /.rome-home/link")
  assert isolated.verify("ls -A ~").output == ""
  isolated.run("i=0; while mkdir d$i 2>/dev/null; do i=$((i + 1)); done; rmdir d0; mkdir d0", 60)
  assert isolated.verify("echo ~; exit 3").exit_code == 3


def test_settings_that_make_programs_run_other_code_are_the_images(isolated):
  root = isolated.session("root", user="root")
  root.run("cd /etc; echo x > gitconfig; echo /work/evil.so > ld.so.preload; echo kept > hostname2")
  result = isolated.verify("cd /etc; ls gitconfig ld.so.preload 2>/dev/null; cat hostname2")
  assert result.output == "kept\n"


@pytest.mark.slow
def test_holes_cannot_fill_the_hosts_disk_through_an_image(sandboxes):
  sandbox = sandboxes("podman")
  sandbox.run("for i in $(seq 40); do truncate -s 30M f$i; done")
  with pytest.raises(SandboxError, match="File too large"):
    sandbox.commit("rome-test-holes")


def test_root_keeps_few_capabilities(isolated):
  status = isolated.verify("cat /proc/self/status").output
  for name in ("CapPrm", "CapEff", "CapBnd"):
    assert f"{name}:\t00000000000000eb" in status
  status = isolated.run("cat /proc/self/status").output
  for name in ("CapPrm", "CapEff", "CapBnd"):
    assert f"{name}:\t0000000000000000" in status


def test_a_link_of_roots_leads_no_file_operation_out(isolated):
  """Root may put links where rocklet, which is outside, looks for directories."""
  isolated.verify("cd /; mv work w; ln -s /w work; mv tmp t; ln -s / tmp; ln -s / up")
  for path in ("/work/x", "/up/etc/passwd", "/tmp/x"):
    with pytest.raises(SandboxError, match="directory"):
      isolated.write_file(path, b"")
  assert isolated.read_file("/etc/hostname") == b"rome\n"
  assert "left out" in isolated.run("head -c 100000 /dev/zero | tr '\\0' x").output


def test_a_process_sees_only_the_sandbox(isolated):
  shown = isolated.run("cd ..; cd /proc/self/cwd/../../..; pwd; ls -A /; readlink /proc/self/root")
  assert shown.output.splitlines()[0] == "/" and shown.output.endswith("\n/\n")
  assert "upper" not in shown.output and "scratch" not in shown.output


def test_a_kernel_that_refuses_is_named(monkeypatch):
  from rome.envs.backends import bubblewrap

  monkeypatch.setattr(
    bubblewrap, "CAPABILITIES", [c for c in bubblewrap.CAPABILITIES if c != "SYS_ADMIN"]
  )
  with pytest.raises(SandboxLost, match="writable root cannot be made .* Linux 5.13 or later"):
    make_sandbox(backend="bubblewrap")


@pytest.mark.slow
def test_a_kernel_that_refuses_podman_is_named(monkeypatch):
  kept = [c for c in podman_spec.CAPABILITIES if c != "SYS_ADMIN"]
  monkeypatch.setattr(podman_spec, "CAPABILITIES", kept)
  with pytest.raises(BackendUnavailable, match="writable root cannot be made .*Linux 5.13"):
    make_sandbox(backend="podman")


def test_root_inside_cannot_ask_for_the_end_of_the_sandbox(isolated, tmp_path):
  source, binary = pathlib.Path(__file__).parent / "terminate.c", tmp_path / "terminate"
  subprocess.run(["gcc", "-static", "-Wall", "-Werror", "-o", binary, source], check=True)
  isolated.write_file("terminate", binary.read_bytes(), mode=0o755)
  assert isolated.verify("kill 1; ./terminate; sleep 0.2").output == "0\n"
  assert isolated.alive()


def test_a_program_of_the_agent_cannot_rewrite_the_tests_that_run_it(isolated):
  rewrite = """#!/bin/sh
    for file in /proc/$PPID/fd/250 /proc/$PPID/fd/255 /proc/self/fd/250; do
      yes 'exit 0' | head -n 100 > $file
    done
    echo rewritten
  """
  isolated.write_file("solution", rewrite.encode(), mode=0o755)
  result = isolated.verify("./solution 2>/dev/null\n[ -e answer ] || exit 3\nexit 0\n")
  assert (result.exit_code, result.output) == (3, "rewritten\n")


def exists(sandbox, path):
  try:
    return sandbox.lstat(path).kind == "file"
  except SandboxError:
    return False


def test_a_command_in_a_session_does_not_end_the_tests(isolated):
  other, verdicts = isolated.session("other"), []

  def verify():
    verdicts.append(isolated.verify(": > started; while [ ! -e /work/end ]; do sleep 0.1; done"))

  tests = threading.Thread(target=verify)
  tests.start()
  while not exists(isolated, "started"):
    time.sleep(0.05)
  with pytest.raises(SandboxError, match="busy"):
    other.run("echo early")  # its shell has ended, and no new one may start yet
  isolated.write_file("end", b"")
  tests.join(30)
  assert [verdict.exit_code for verdict in verdicts] == [0]
  assert other.run("echo late").output.endswith("late\n")
  other.close()


def test_the_environment_of_the_tests_is_not_the_agents(isolated):
  isolated.run("export EXTRA=1; echo 'export FORGED=1' > .bashrc")
  path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
  names = f"HOME=/.rome-home\nLC_ALL=C\nPATH={path}"
  script = "env | grep -v '^_=\\|^SHLVL=\\|^PWD=' | sort"
  assert isolated.verify(script).output == names + "\nTZ=UTC\n"


def test_root_inside_cannot_change_devices_which_may_be_the_machines_own(isolated):
  # To the mode that they have: where this got through, nothing would be harmed.
  script = """
    for device in null zero full random urandom tty; do
      chmod 666 /dev/$device 2>/dev/null && echo "changed $device"
      touch /dev/$device 2>/dev/null && echo "touched $device"
    done
    echo written > /dev/null && head -c 3 /dev/zero | wc -c
  """
  before = os.stat("/dev/full").st_ctime_ns
  assert isolated.verify(script).output == "3\n"
  assert os.stat("/dev/full").st_ctime_ns == before


def test_what_the_kernel_tells_root_of_the_whole_machine_is_empty(isolated):
  names = "kcore kpagecount kpageflags kpagecgroup slabinfo vmallocinfo pagetypeinfo timer_list"
  script = f"for name in {names}; do head -c 1 /proc/$name 2>/dev/null; done | wc -c"
  assert isolated.verify(script).output == "0\n"
