"""The live report: up to date in a real browser, closed to others, calm about torn files."""

import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from rome.train import metrics, report, report_page
from tests.train import run_files

pytestmark = pytest.mark.slow


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
  path = tmp_path / "quickstart"
  path.mkdir()
  return path


@pytest.fixture
def served(workdir):
  """The port at which `rome report WORKDIR --live` serves, and its process."""
  process = subprocess.Popen(
    [sys.executable, "-m", "rome.cli", "report", str(workdir), "--live"],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip
  found = re.fullmatch(
    r"serving http://127\.0\.0\.1:(\d+)/ until Ctrl-C\n", process.stdout.readline()
  )
  assert found, process.stderr.read()
  yield int(found[1]), process
  process.kill()
  process.communicate()


def get(port, path="/", host=None):
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
  connection.request("GET", path, headers={"Host": host} if host else {})
  answer = connection.getresponse()
  body = answer.read().decode()
  connection.close()
  return answer, body


def test_it_waits_for_the_run_follows_it_and_stops_asking_at_its_end(workdir, served):
  port, process = served
  answer, body = get(port)
  assert answer.status == 503 and "Waiting: " in body and 'http-equiv="refresh"' in body
  run_files.write_run(workdir, finished=False, updates=3)
  answer, body = get(port)
  assert answer.status == 200 and "phase rl, step 3" in body and 'http-equiv="refresh"' in body
  assert answer.headers["Content-Security-Policy"] == report_page.POLICY
  assert answer.headers["Cache-Control"] == "no-store"

  with open(workdir / "metrics.jsonl", "ab") as file:  # A row in two writes.
    file.write(b'{"phase": "rl", "step"')
    file.flush()
    assert get(port)[1] == body
    file.write(b': 4, "wall": 9.0, "success": 1.0}\n')
  assert "phase rl, step 4" in get(port)[1]
  (workdir / "summary.json").write_text('{"success_after": 0.')
  answer, body = get(port)
  assert answer.status == 200 and "phase rl, step 4" in body
  (workdir / "summary.json").write_text('{"success_after": 0.75}')
  body = get(port)[1]
  assert "75 %" in body and "refresh" not in body
  assert not (workdir / "report.html").exists()

  process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=30)
  assert (process.returncode, out, err) == (0, "", "")


def test_only_this_machine_by_its_own_name_sees_the_page(workdir, served):
  port, _ = served
  run_files.write_run(workdir, updates=2)
  assert get(port, host=f"localhost:{port}")[0].status == 200
  for host in ("attacker.example", f"attacker.example:{port}", "127.0.0.1"):
    assert get(port, host=host)[0].status == 403
  for path in ("/metrics.jsonl", "/../metrics.jsonl", "/?x"):
    assert get(port, path)[0].status == 404
  listening = pathlib.Path("/proc/net/tcp").read_text()
  assert f"0100007F:{port:04X}" in listening and f"00000000:{port:04X}" not in listening


@pytest.mark.parametrize(
  ("flags", "message"),
  [(["--live", "--port=99999"], "cannot listen on port 99999"), (["--live"], "is no directory")],
)
def test_mistakes_are_one_line(tmp_path, capsys, flags, message):
  where = tmp_path if len(flags) > 1 else tmp_path / "nowhere"
  assert report.main([str(where), *flags]) == 1
  error = capsys.readouterr().err
  assert error.startswith("rome report: ") and message in error and error.count("\n") == 1


def test_a_port_without_live_is_refused(tmp_path, capsys):
  with pytest.raises(SystemExit):
    report.main([str(tmp_path), "--port=1"])
  assert "--port is of --live" in capsys.readouterr().err


class Browser:
  """Headless Chromium, asked over its debugging pipe for what it shows; it runs no script."""

  def __init__(self, url: str, profile: pathlib.Path):
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((path for path in map(shutil.which, names) if path), None)
    assert path, "no Chromium; as root: apt-get install chromium (make test does it)"
    theirs_in, self._to = os.pipe()
    self._from, theirs_out = os.pipe()
    options = (
      *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
      *("--disable-background-networking", "--disable-component-update"),
      *("--remote-debugging-pipe", f"--user-data-dir={profile}"),
    )
    # The pipe is where its file descriptors 3 and 4 are.
    self.process = subprocess.Popen(
      ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "-", path, *options, url],
      pass_fds=(theirs_in, theirs_out),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
      env={**os.environ, "HOME": str(profile.parent)},
    )
    os.close(theirs_in)
    os.close(theirs_out)
    self._count, self._rest = 0, b""
    self._session: str | None = None

  def ask(self, method: str, **params):
    self._count += 1
    message = {"id": self._count, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._to, json.dumps(message).encode() + b"\0")
    while True:
      while b"\0" not in self._rest:
        data = os.read(self._from, 1 << 20)
        assert data, "the browser has gone"
        self._rest += data
      line, _, self._rest = self._rest.partition(b"\0")
      answer = json.loads(line)
      if answer.get("id") == self._count:
        return answer.get("result")

  def attach(self) -> None:
    """To the page that it was started with."""
    pages: list[dict] = []
    while not pages:
      found = self.ask("Target.getTargets")["targetInfos"]
      pages = [target for target in found if target["type"] == "page"]
      time.sleep(0.1)
    where = self.ask("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
    self._session = where["sessionId"]

  def shows(self, text: str, timeout: float = 60) -> str:
    """The page once it holds `text`; between two pages there may be none."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
      root = self.ask("DOM.getDocument", depth=0)
      page = root and self.ask("DOM.getOuterHTML", nodeId=root["root"]["nodeId"])
      if page and text in page["outerHTML"]:
        return page["outerHTML"]
      time.sleep(0.2)
    raise AssertionError(f"never showed {text!r}")

  def close(self) -> None:
    self.process.kill()
    self.process.wait()
    os.close(self._to)
    os.close(self._from)


def test_the_figure_changes_in_an_open_browser(workdir, served, tmp_path):
  run_files.write_run(workdir, finished=False, updates=3)
  browser = Browser(f"http://127.0.0.1:{served[0]}/", tmp_path / "profile")
  try:
    browser.attach()
    before = browser.shows("phase rl, step 3")
    assert "success at step 4" not in before.replace("\u00a0", " ")
    with metrics.MetricsWriter(workdir) as writer:
      writer.write("rl", 4, {"success": 0.125, "loss": 0.5})
    after = browser.shows("phase rl, step 4")  # Nobody told the browser to look again.
  finally:
    browser.close()
  # The pale line of the first chart, the success of each batch, has a point more.
  line = re.compile(r'<polyline class="line faint c1" points="([^"]*)"')
  assert [len(line.search(page)[1].split()) for page in (before, after)] == [3, 4]
  assert "<script" not in after
