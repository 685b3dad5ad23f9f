"""`rome sandbox` against a service, and against this machine."""

import signal
import subprocess
import sys
import time

import pytest

from rome.envs import sandbox, sandbox_cli
from tests.envs.service.conftest import ALICE, service, tokens_file  # noqa: F401


@pytest.fixture
def remote(service, monkeypatch):  # noqa: F811
  monkeypatch.setenv("ROME_SANDBOX_URL", service.url)
  monkeypatch.setenv("ROME_SANDBOX_TOKEN", ALICE)
  with service.client() as client, client.create(labels={"for": "cli"}) as made:
    yield made


def test_run_on_a_service_passes_output_and_status_on(remote, capsys):
  assert sandbox_cli.main(["run", "echo out; exit 3"]) == 3
  assert capsys.readouterr().out == "out\n"
  assert sandbox_cli.main(["run", "--timeout=0.3", "sleep 30"]) == 124
  assert "stopped after 0.3 s" in capsys.readouterr().err
  views = remote.client.views()
  assert [view["state"] for view in views if view["id"] != remote.id].count("running") == 0


def test_ps_stats_and_logs_of_a_service(remote, capsys):
  assert sandbox_cli.main(["ps"]) == 0
  row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(remote.id))
  assert " running " in row
  assert sandbox_cli.main(["stats"]) == 0
  heading, *rows = capsys.readouterr().out.splitlines()
  assert "PROCESSES" in heading and any(line.startswith(remote.id) for line in rows)
  assert sandbox_cli.main(["logs", remote.id]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert " pending " in lines[1] and " running " in lines[2]


def test_exec_uses_a_session_of_its_own(remote, capsys):
  remote.run("cd /tmp; x=1")
  assert sandbox_cli.main(["exec", remote.id, "echo $x; pwd; exit 4"]) == 4
  assert capsys.readouterr().out == "\n/work\n"
  assert remote.call("GET", "sessions").json() == {"sessions": []}


def test_what_is_not_there_is_one_line(remote, capsys):
  for arguments in (["logs", "nobody"], ["exec", "nobody", "true"], ["stats", "nobody"]):
    assert sandbox_cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rome sandbox: ") and error.count("\n") == 1
  assert sandbox_cli.main(["ps", "--url=http://127.0.0.1:9"]) == 2
  assert "cannot be reached" in capsys.readouterr().err
  assert sandbox_cli.main(["ps", "--token=wrong"]) == 2
  assert "no valid token" in capsys.readouterr().err


def test_stats_and_exec_on_this_machine(capsys, monkeypatch):
  monkeypatch.delenv("ROME_SANDBOX_URL", raising=False)
  with sandbox.make_sandbox(backend="bubblewrap") as mine:
    assert sandbox_cli.main(["stats", mine.id]) == 0
    assert mine.id in capsys.readouterr().out
    assert sandbox_cli.main(["exec", mine.id, "echo here; exit 5"]) == 5
    assert capsys.readouterr().out == "here\n"
    assert sandbox_cli.main(["exec", "--timeout=0.3", mine.id, "sleep 30"]) == 124
    capsys.readouterr()
    assert sandbox_cli.main(["logs", mine.id]) == 2
    assert "--url" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_a_run_and_its_sandbox():
  command = [sys.executable, "-m", "rome.cli", "sandbox", "run", "--sandbox=bubblewrap"]
  process = subprocess.Popen(
    [*command, "--timeout=600", "sleep 500"], stderr=subprocess.PIPE, text=True
  )
  pid = f":{process.pid}:"
  while not any(pid in label for label in sandbox_cli.owned_directories().values()):
    time.sleep(0.05)
  time.sleep(0.5)
  process.send_signal(signal.SIGINT)
  error = process.communicate(timeout=60)[1]
  assert process.returncode == 130 and error == "rome sandbox: interrupted\n"
  assert not any(pid in label for label in sandbox_cli.owned_directories().values())
