"""The base image: same inputs, same archive; two builders at once; hosts that cannot build it."""

import subprocess
import sys
import tarfile

import pytest

from rome.envs import image
from rome.envs.common import ImageError


def test_content_is_fixed():
  path, tag = image.base_archive()
  assert tag.startswith("localhost/rome-base:") and len(tag.split(":")[1]) == 16
  with tarfile.open(path) as tar:
    members = tar.getmembers()
  assert {(m.mtime, m.uid, m.gid) for m in members} == {(image.EPOCH, 0, 0)}
  names = {m.name for m in members}
  assert {"./bin/bash", "./bin/busybox", "./bin/ls", "./etc/passwd", "./usr/bin/env"} <= names


def test_two_builders_at_once(tmp_path):
  """Both get the same finished image, and nothing half-made stays behind."""
  program = "from rome.envs import image; print(image.base_archive()[1])"
  env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"}
  both = [
    subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)
    for _ in range(2)
  ]
  tags = [process.communicate(timeout=120)[0] for process in both]
  assert tags[0] == tags[1] == image.base_archive()[1] + "\n"
  left = sorted(path.name.split("-")[0] for path in (tmp_path / "rome").iterdir())
  assert left == ["base", "base", "base.lock"]


def test_without_packages_and_static_binaries(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("PATH", "/nonexistent")
  with pytest.raises(ImageError, match="no apt-get; install them .apt-get install busybox-static"):
    image.base_rootfs()


def test_static_binaries_are_told_apart():
  root = image.base_rootfs()
  assert image._is_static(str(root / "bin/bash"))
  assert not image._is_static("/bin/bash")
  assert not image._is_static(str(root / "etc/passwd"))
