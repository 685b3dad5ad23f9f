"""Wheels for images, from a directory in the registry's place."""

import zipfile

import pytest

from rome.envs import wheels
from rome.envs.common import ImageError


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache; pip finds rome-nothing 1.0 alone."""
  shelf = tmp_path / "shelf"
  shelf.mkdir()
  info = "rome_nothing-1.0.dist-info"
  with zipfile.ZipFile(shelf / "rome_nothing-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: rome-nothing\nVersion: 1.0\n")
    wheel.writestr(
      f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    wheel.writestr(f"{info}/RECORD", "")
  monkeypatch.setenv("PIP_NO_INDEX", "1")
  monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr(
    wheels.platform, "freedesktop_os_release", lambda: {"VERSION_CODENAME": "bookworm"}
  )
  return tmp_path / "rome/wheels/bookworm"


@pytest.mark.slow
def test_a_wheel_that_was_cut_off_is_fetched_anew(cache):
  (wheel,) = wheels.fetch(("Rome.nothing==1.0",))
  whole = wheel.read_bytes()
  wheel.write_bytes(whole[:100])  # as a pip that is killed leaves it
  assert wheels.fetch(("rome_nothing==1.0",)) == [wheel] and wheel.read_bytes() == whole
  assert list(cache.iterdir()) == [wheel]  # and nothing beside it
  with pytest.raises(ImageError, match=r"fetching wheels: ERROR: .*rome-nothing==2\.0"):
    wheels.fetch(("rome-nothing==2.0",))
