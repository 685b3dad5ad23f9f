"""What `rome.envs` exports is there, and what is heavy comes at its first use."""

import pytest

import rome.envs
from tests.import_test import loaded_modules


def test_every_name_is_there():
  for name in rome.envs.__all__:
    assert name == "FAMILIES" or getattr(rome.envs, name).__module__.startswith("rome.envs")
    assert name in dir(rome.envs)
  with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
    rome.envs.Nonsense  # noqa: B018


def test_further_libraries_wait_for_their_first_use():
  extras = {"httpx", "ray", "fastapi", "podman", "h11", "prometheus_client", "requests"}
  assert not loaded_modules("import rome.envs") & extras
  assert "httpx" in loaded_modules("from rome.envs import Client")


def test_what_a_user_writes_first(tmp_path):
  from rome.envs import Manager, NetworkPolicy, SandboxSpec, Snapshot, make_sandbox

  policy = NetworkPolicy(allow=("pypi.org:443",))
  with make_sandbox(backend="bubblewrap", network=policy) as sandbox:
    assert sandbox.session("admin", user="root").run("id -u").output == "0\n"
    sandbox.run("x=7; echo kept > file")
    sandbox.snapshot().save(tmp_path / "s.snapshot")
    with sandbox.fork() as fork:
      assert fork.network == policy
      assert fork.run("cat file; echo $x").output == "kept\n7\n"
  loaded = Snapshot.load(tmp_path / "s.snapshot")
  with Manager() as manager:
    record = manager.create(SandboxSpec(backend="bubblewrap"))
    record.sandbox.restore(loaded)
    assert record.sandbox.run("cat file").output == "kept\n"
