"""Trees between host and sandbox: what is kept, what is refused, races, and large files."""

import hashlib
import os
import pathlib
import resource
import stat
import subprocess
import threading

import pytest

from rome.envs import trees
from rome.envs.common import Limits, SandboxError, SandboxLost
from rome.envs.sandbox import make_sandbox

MIB = 1 << 20


def _sha256(data):
  return hashlib.sha256(data).hexdigest()


def _grow(top):
  """A tree with an empty directory, modes, odd names and a file of several parts."""
  (top / "a/empty").mkdir(parents=True)
  (top / "a/run").write_bytes(b"#!/bin/sh\n")
  (top / "a/run").chmod(0o755)
  (top / "a/private").write_bytes(b"")
  (top / "a/private").chmod(0o600)
  (top / "a/y y\n").write_bytes(b"2")
  (top / "big").write_bytes(os.urandom(2 * MIB + 5))
  with open(os.fsencode(top) + b"/\xff", "wb") as file:
    file.write(b"\0")


def test_a_tree_there_and_back_is_the_same(sandbox, tmp_path):
  _grow(tmp_path / "t")
  up = sandbox.upload(tmp_path / "t", "t")
  assert (up.files, up.bytes, up.skipped) == (5, 10 + 1 + 2 * MIB + 5 + 1, ())
  assert sandbox.run("stat -c %a t/a/run t/a/private t/a/empty").output == "755\n600\n755\n"
  down = sandbox.download("t", tmp_path / "back", sha256=up.sha256)
  assert down == up
  back = tmp_path / "back"
  assert (back / "big").read_bytes() == (tmp_path / "t/big").read_bytes()
  assert stat.S_IMODE((back / "a/run").stat().st_mode) == 0o755
  assert (back / "a/run").stat().st_mtime == 1577836800
  assert sandbox.upload(back, "again").sha256 == up.sha256
  sandbox.run("chmod 644 t/a/run")
  assert sandbox.download("t", tmp_path / "other").sha256 != up.sha256


def test_the_manifest_is_as_documented(isolated, tmp_path):
  (tmp_path / "t/d").mkdir(parents=True)
  (tmp_path / "t/d").chmod(0o750)
  (tmp_path / "t/d/f").write_bytes(b"x")
  (tmp_path / "t/d/f").chmod(0o640)
  text = f"d 750 0 - d\0f 640 1 {_sha256(b'x')} d/f\0"
  assert isolated.upload(tmp_path / "t", "t").sha256 == _sha256(text.encode())
  assert isolated.upload(tmp_path / "t/d/f", "f") == trees.Transfer(1, 1, _sha256(b"x"))


def test_what_is_left_out_is_told(isolated, tmp_path):
  isolated.run(
    "mkdir -p t/d; ln -s /etc/passwd t/link; mkfifo t/d/fifo; echo x > t/f; ln -s d t/dl"
  )
  done = isolated.download("t", tmp_path / "t")
  assert done.files == 1
  assert [path for path, _ in done.skipped] == ["d/fifo", "dl", "link"]
  assert done.skipped[2][1] == "a symbolic link" and "fifo" in done.skipped[0][1]
  with pytest.raises(SandboxError, match="'t/link'"):
    isolated.download("t/link", tmp_path / "l")
  with pytest.raises(SandboxError, match="'t/dl/fifo'"):
    isolated.download("t/dl/fifo", tmp_path / "l")
  assert os.listdir(tmp_path) == ["t"]


def test_modes_on_the_host_ignore_umask_and_setuid(isolated, tmp_path):
  isolated.run("mkdir t t/closed; echo x > t/f; chmod 6777 t/f; chmod 1777 t; chmod 0 t/closed")
  before = os.umask(0o077)
  try:
    isolated.download("t", tmp_path / "t")
    isolated.download("t/f", tmp_path / "f")
  finally:
    os.umask(before)
  modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
  assert (modes["f"], modes["closed"]) == (0o777, 0o700)
  assert not modes["t"] & 0o7000


def test_a_download_is_whole_or_not_at_all(sandbox, tmp_path):
  sandbox.run("mkdir t; echo 1 > t/a; echo 22 > t/b; ln -s x t/c")
  for options, why in (
    ({"max_bytes": 4}, "'t/b'.*larger than the limit"),
    ({"max_files": 2}, "'t'.*more than 2 files"),
    ({"sha256": "0" * 64}, "'t' has sha256"),
  ):
    with pytest.raises(SandboxError, match=why):
      sandbox.download("t", tmp_path / "t", **options)
  with pytest.raises(SandboxError, match="'t/a' has sha256"):
    sandbox.download("t/a", tmp_path / "t", sha256="0" * 64)
  (tmp_path / "there").symlink_to("/nowhere")
  for remote in ("t", "t/a"):
    with pytest.raises(FileExistsError):
      sandbox.download(remote, tmp_path / "there")
  assert os.listdir(tmp_path) == ["there"]
  assert sandbox.download("t/a", tmp_path / "a", sha256=_sha256(b"1\n")).bytes == 2


def test_sparse_bombs_count_together(isolated, tmp_path):
  isolated.run("mkdir t; for i in 1 2 3 4; do truncate -s 7M t/$i; done")
  with pytest.raises(SandboxError, match="'t/3'.*larger than the limit"):
    isolated.download("t", tmp_path / "t", max_bytes=20 * MIB)
  assert os.listdir(tmp_path) == []


def test_wide_and_deep_directories_are_refused(isolated, tmp_path):
  isolated.run("mkdir wide; cd wide; touch $(seq 1500); cd ..")
  with pytest.raises(SandboxError, match="'wide'.*more than 1000 files"):
    isolated.download("wide", tmp_path / "t", max_files=1000)
  isolated.run(f"mkdir -p deep/{'d/' * 300}")
  with pytest.raises(SandboxError, match="'deep/d/d.*deeper than 256 directories"):
    isolated.download("deep", tmp_path / "t")
  assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_directory_of_a_million_names(tmp_path):
  """Wider than any limit, and with more text than one listing holds."""
  limits = Limits(memory_mb=4096, disk_mb=3000, open_files=1024)
  with make_sandbox(backend="bubblewrap", limits=limits) as box:
    made = box.run("mkdir w; cd w; seq 1000000 | sed 's/^/long-name-/' | xargs touch", timeout=240)
    if made.exit_code == 0:
      with pytest.raises(SandboxError, match="'w'.*more than 100000 files"):
        box.download("w", tmp_path / "w")
      with pytest.raises(SandboxError, match="'w'.*more than 5000000 files or 16 MiB of names"):
        box.download("w", tmp_path / "w", max_files=5_000_000)  # more than one listing holds
    else:
      assert "No space left" in made.output
    box.remove("w", timeout=120)
    assert box.run("cd; ls -A").output == ""


def test_other_file_systems_are_left_out(isolated, tmp_path):
  done = isolated.download("/dev", tmp_path / "dev")
  why = dict(done.skipped)
  assert why["shm"] == "it is another file system"
  assert why["null"] == "a device, a fifo or a socket"


def test_uploads_refuse_what_is_no_file(isolated, tmp_path):
  top = tmp_path / "t"
  top.mkdir()
  os.mkfifo(top / "fifo")
  for bad in (top, top / "fifo", tmp_path / "missing"):
    with pytest.raises(SandboxError, match=str(bad)):
      isolated.upload(bad, "x")
  (top / "fifo").unlink()
  (top / "link").symlink_to("/etc/passwd")
  with pytest.raises(SandboxError, match="link is neither"):
    isolated.upload(top, "x")
  (tmp_path / "f").write_bytes(b"data")
  with pytest.raises(SandboxError, match="has sha256 .* not sent"):
    isolated.upload(tmp_path / "f", "f", sha256="0" * 64)
  with pytest.raises(ValueError, match="single file"):
    isolated.upload(top, "x", sha256="0" * 64)
  assert isolated.run("ls f").exit_code != 0


def test_upload_through_links_is_refused(isolated, tmp_path):
  isolated.write_file("/tmp/root/keep", b"", mode=0o600, owner="root")
  (tmp_path / "t/d").mkdir(parents=True)
  (tmp_path / "t/d/f").write_bytes(b"x")
  isolated.run("ln -s /tmp/root link; mkdir t; ln -s /tmp/root t/d")
  for remote in ("link", "link/x", "t"):
    with pytest.raises(SandboxError, match=f"'{remote}"):
      isolated.upload(tmp_path / "t", remote)
  assert isolated.run("ls -A /tmp/root").output == "keep\n"


def test_upload_for_root(isolated, tmp_path):
  (tmp_path / "t/d").mkdir(parents=True)
  (tmp_path / "t/d/f").write_bytes(b"x")
  isolated.upload(tmp_path / "t", "t", owner="root")
  assert isolated.run("stat -c %u t t/d t/d/f").output == "0\n0\n0\n"
  with pytest.raises(ValueError, match="owner must be"):
    isolated.upload(tmp_path / "t", "t", owner="1000")


@pytest.mark.slow
def test_upload_resumes(sandboxes, tmp_path):
  """The connection is cut while the file is on its way, several times."""
  sandbox = sandboxes("bubblewrap")
  (tmp_path / "f").write_bytes(os.urandom(12 * MIB))
  digest = _sha256((tmp_path / "f").read_bytes())
  write = trees.Upload.write
  cuts = []

  def cut_often(upload, data):
    if upload.offset and not upload.offset % (4 * MIB) and upload.offset not in cuts:
      cuts.append(upload.offset)
      upload._channel.close()
    write(upload, data)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(trees.Upload, "write", cut_often)
    with pytest.raises(SandboxLost):
      sandbox.upload(tmp_path / "f", "f")
    cuts.clear()
    assert sandbox.upload(tmp_path / "f", "f", resume=True).sha256 == digest
  assert cuts == [4 * MIB, 8 * MIB]
  assert sandbox.run("sha256sum < f").output.split()[0] == digest


def _upload_swapper(box, tmp_path):
  program = tmp_path / "swapper"
  source = pathlib.Path(__file__).with_name("swapper.c")
  subprocess.run(["gcc", "-static", "-O1", "-o", program, source], check=True)
  box.upload(program, "swapper")


@pytest.mark.slow
@pytest.mark.parametrize("aim", ["/etc", "/tmp/root"])
def test_races_against_a_swapped_directory(isolated, tmp_path, aim):
  """A directory and a symbolic link to root's files change places while the host transfers."""
  isolated.write_file("/tmp/root/passwd", b"root's", mode=0o600, owner="root")
  isolated.write_file("/tmp/root/sub/secret", b"root's", mode=0o600, owner="root")
  isolated.run(f"mkdir -p d/sub; echo mine | tee d/passwd d/sub/secret; ln -s {aim} l")
  (tmp_path / "up/sub").mkdir(parents=True)
  for name in ("passwd", "new", "sub/secret"):
    (tmp_path / "up" / name).write_bytes(b"mine\n")
  _upload_swapper(isolated, tmp_path)
  listing = "verify() { ls -lanR /tmp/root /etc; cat /tmp/root/* /etc/passwd; }; verify 2>/dev/null"
  before = isolated.verify(listing).output
  assert "root's" in before
  pid = isolated.run("./swapper d l 240 > /dev/null 2>&1 & echo $!").output.strip()
  outcomes = {"up": 0, "down": 0, "refused": 0}
  for i in range(500):
    for act in ("file", "tree", "read", "down"):
      try:
        if act == "file":
          isolated.write_file("d/passwd", b"mine\n")
        elif act == "tree":
          isolated.upload(tmp_path / "up", "d")
        elif act == "read":
          assert isolated.read_file("d/passwd") == b"mine\n"
        else:
          isolated.download("d", tmp_path / f"down{i}")
          for found in (tmp_path / f"down{i}").rglob("*"):
            assert found.is_dir() or found.read_bytes() == b"mine\n", found
        outcomes["down" if act in ("read", "down") else "up"] += 1
      except SandboxError as error:
        assert "'d" in str(error)
        outcomes["refused"] += 1
  isolated.run(f"kill {pid}")
  assert sum(outcomes.values()) == 2000
  assert min(outcomes.values()) > 20, outcomes  # both sides of the race were met
  assert isolated.verify(listing).output == before


@pytest.mark.slow
def test_a_large_file_both_ways_in_flat_memory(tmp_path):
  size = 1100 * MIB
  limits = Limits(memory_mb=4096, disk_mb=2048)
  source, back = tmp_path / "source", tmp_path / "back"
  digest = hashlib.sha256()
  with open(source, "wb") as file:
    for i in range(size // MIB):
      part = hashlib.shake_128(str(i).encode()).digest(1024) * 1024
      digest.update(part)
      file.write(part)
  try:
    with make_sandbox(backend="bubblewrap", limits=limits) as box:
      box.upload(__file__, "warm")
      before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      up = box.upload(source, "big", sha256=digest.hexdigest())
      source.unlink()
      assert up.bytes == size
      down = box.download("big", back, max_bytes=size, sha256=digest.hexdigest())
      assert (down.files, down.bytes) == (1, size)
      assert back.stat().st_size == size
      grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
      assert grown < 64 << 10, f"{grown} KiB"  # ru_maxrss counts KiB
  finally:
    source.unlink(missing_ok=True)
    back.unlink(missing_ok=True)


def test_two_downloads_to_one_place(isolated, tmp_path):
  isolated.write_file("f", b"x" * 3 * MIB)
  outcomes = []

  def fetch():
    try:
      outcomes.append(isolated.download("f", tmp_path / "f"))
    except FileExistsError as error:
      outcomes.append(error)

  threads = [threading.Thread(target=fetch) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sum(isinstance(outcome, trees.Transfer) for outcome in outcomes) == 1
  assert len(outcomes) == 6 and os.listdir(tmp_path) == ["f"]
