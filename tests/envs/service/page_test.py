"""The status page: what it shows, and that nothing on it is taken for markup."""

import base64
import pathlib
import shutil
import subprocess
import tempfile

import pytest

from rome.envs import Limits
from rome.envs.common import SandboxSpec
from rome.envs.lifecycle import Lifecycle
from rome.envs.records import Record
from rome.envs.service import auth, page
from tests.envs.service.conftest import ALICE

EVIL = "<script>alert(1)</script>\"'&{{7*7}}"


def _record(image, state="pending", reason="created"):
  life = Lifecycle(1000.0, reason)
  if state != "pending":
    life.move(state, 1001.0, reason)
  return Record(SandboxSpec(image=image, limits=Limits(memory_mb=300)), EVIL, EVIL, life, 0.0, 1.0)


def test_everything_from_outside_is_escaped():
  records = [_record(EVIL, "failed", EVIL)]
  text = page.render(auth.Tenant("a"), records, {EVIL: 1.0}, 0.0)
  assert "<script" not in text and "&lt;script&gt;" in text and "{{7*7}}" in text


def test_states_quotas_and_counts_are_shown():
  records = [_record("one"), _record("two", "failed", "no such image")]
  quotas = auth.Quotas(sandboxes=4, memory_mb=1000)
  text = page.render(auth.Tenant("alice", quotas), records, {"queue_length": 1234567.0}, 0.0)
  for part in ("Tenant alice", "1 / 4", "300 / 1000", "no such image", "queue length", "1,234,567"):
    assert part in text
  assert "None yet." in page.render(auth.Tenant("alice"), [], {}, 0.0)


def test_the_newest_are_shown_and_the_rest_counted(monkeypatch):
  monkeypatch.setattr(page, "SHOWN", 2)
  text = page.render(auth.Tenant("a"), [_record(f"image{i}") for i in range(5)], {}, 0.0)
  assert text.count("base image") + text.count("image") and "3 older ones" in text


def test_a_browser_may_send_the_token_as_a_password(service, sandbox):
  with service.http(token=None) as http:
    password = base64.b64encode(f"me:{ALICE}".encode()).decode()
    response = http.get("/", headers={"Authorization": f"Basic {password}"})
    assert response.status_code == 200 and sandbox.id in response.text
    policy = response.headers["Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    refused = http.get("/v1/sandboxes", headers={"Authorization": f"Basic {password}"})
    assert refused.status_code == 401


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_a_browser_shows_it(service, sandbox, tmp_path):
  """As the browser parses it: the title, the sandbox's row, no script."""
  with service.http() as http:
    text = http.get("/").text
  path = tmp_path / "page.html"
  path.write_text(text)
  with tempfile.TemporaryDirectory() as profile:
    flags = (
      "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
      "--disable-background-networking --disable-component-update --disable-sync --dump-dom"
    )
    command = ["chromium", *flags.split(), f"--user-data-dir={profile}", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
  assert f">{sandbox.id}</td>" in shown and "<script" not in shown
  assert pathlib.Path(path).stat().st_size < 200_000
