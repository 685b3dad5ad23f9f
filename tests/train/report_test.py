"""The report of whole and partial runs, of hostile text and broken files; in a real browser."""

import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from rome.train import metrics, report
from tests.train import run_files


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
  path = tmp_path / "quickstart"
  path.mkdir()
  return path


def write(workdir: pathlib.Path, **options) -> str:
  run_files.write_run(workdir, **options)
  return report.write_report(workdir).read_text()


class Tags(html.parser.HTMLParser):
  """Tags, attributes and text of a page, and a check that tags close in order."""

  VOID = {"meta", "br", "img", "link"}

  def __init__(self, page: str):
    super().__init__()
    self.tags: list[str] = []
    self.attributes: list[tuple[str, str | None]] = []
    self.words: list[str] = []
    self._open: list[str] = []
    self.feed(page)
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def text_of(page: str) -> str:
  """What a person reads, with single plain spaces."""
  return " ".join(" ".join(Tags(page).words).split())


def test_the_page_is_self_contained_and_well_formed(workdir):
  page = write(workdir)
  tags = Tags(page)
  assert not {"script", "img", "link", "iframe", "object"} & set(tags.tags)
  names = [name for name, _ in tags.attributes]
  assert not {"src", "href"} & set(names) and not [n for n in names if n.startswith("on")]
  assert "url(" not in page and "http" not in page.replace("http-equiv", "")
  assert len(page) < 500_000


def test_headline_and_families(workdir):
  words = text_of(write(workdir))
  assert "40 % → 95 %" in words
  assert "95 % intervals 33–47 % → 91–97 %; 200 instances" in words
  assert "6 min 42 s" in words and "3.03 GiB" in words
  assert re.search(r"extract\s+40\s+10 %\s+4–23 %\s+97.5 %\s+87–100 %", words)


def test_every_curve_is_there(workdir):
  words = text_of(write(workdir))
  for title in (
    *("Success", "Gradient norm, before clipping", "Reply length, tokens"),
    *("Sampler against trainer, |log-ratio|", "Entropy, nats a token"),
    "Sampler against trainer, mean by place in the row",
    *("Share of time in each stage", "Speed, tokens a second"),
    *("Warm start: loss, nats a token", "Warm start: accuracy, held-out success"),
  ):
    assert title in words


def test_curves_hold_the_rows_of_the_run(workdir):
  page = write(workdir).replace("\u00a0", " ")
  rows = metrics.read_jsonl(workdir / "metrics.jsonl")
  spike = next(r for r in rows if r["phase"] == "rl" and r["step"] == 33)
  assert f"gradient norm at step 33: {spike['grad_norm']:.3g}" in page
  assert "held-out at step 0: 40 %" in page and "held-out at step 80: 95 %" in page
  assert "held-out at step 100: 30 %" in page and "held-out at step 290: 40 %" in page


def test_hostile_text_stays_text(workdir):
  page = write(workdir)
  words = Tags(page).words
  assert "<script" not in page and "<img" not in page
  shown = "</pre></script><script>document.title='hacked'</script><img src=x onerror=alert(1)>␛[0m"
  assert shown in words  # The task; below, the observation with a surrogate and an override.
  assert shown + "\\ud800\\u202e" in words


def test_hostile_names_stay_text(workdir):
  run_files.write_run(workdir)
  summary = json.loads((workdir / "summary.json").read_text())
  summary["families"] = {run_files.HOSTILE: {"before": 0.1, "after": 0.2, "n": run_files.HOSTILE}}
  summary |= {"seed": run_files.HOSTILE, "commit": run_files.HOSTILE, "extra": run_files.HOSTILE}
  del summary["families"][run_files.HOSTILE]["n"]
  summary["speeds"] = {run_files.HOSTILE: 1.0}
  (workdir / "summary.json").write_text(json.dumps(summary))
  (workdir / "config.json").write_text(json.dumps({run_files.HOSTILE: run_files.HOSTILE}))
  with metrics.MetricsWriter(workdir) as writer:
    writer.write("eval", 0, {"name": run_files.HOSTILE, "success": run_files.HOSTILE})
    writer.write("eval", 80, {"name": "after", "success": 1.0, "n": run_files.HOSTILE})
    writer.write(run_files.HOSTILE, 1, {"success": 1.0})
  page = report.write_report(workdir).read_text()
  Tags(page)
  assert "<script" not in page and "<img" not in page


def test_a_run_under_way(workdir):
  words = text_of(write(workdir, finished=False))
  assert "This run has not finished" in words and "phase rl, step 80" in words
  assert "40 % → …" in words
  assert re.search(r"count\s+40 %\s+–", words)


def test_a_run_that_only_began(workdir):
  with metrics.MetricsWriter(workdir) as writer:
    writer.write("sft", 0, {"loss": 5.5})
  words = text_of(report.write_report(workdir).read_text())
  assert "not evaluated yet" in words and "Warm start: loss" in words


def test_invalid_episodes_are_no_failures(workdir):
  words = text_of(write(workdir))
  assert re.search(r"find/9\s+invalid", words) and re.search(r"edit/7\s+failed", words)


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("metrics.jsonl", b"", "holds no complete row yet"),
    ("metrics.jsonl", b"\x89PNG\n", "line 1: not JSON"),
    ("metrics.jsonl", b'{"loss": 1}\n', "line 1: no phase and step"),
    ("metrics.jsonl", b'{"phase": "rl", "step": "x"}\n', "line 1: no phase and step"),
    ("summary.json", b"{", "summary.json: not JSON"),
    ("summary.json", b"[]", "summary.json: not a JSON object"),
    ("summary.json", b'{"success_after": "high"}', "success_after is 'high'"),
    ("summary.json", b'{"success_after_interval": [1]}', "success_after_interval is [1]"),
    ("summary.json", b'{"families": {"find": {"before": "?"}}}', "families.find.before is '?'"),
    ("summary.json", b'{"families": [1]}', "families is no object of objects"),
    ("summary.json", b'{"speeds": {"a": "fast"}}', "speeds is {'a': 'fast'}"),
    ("config.json", b"\xff", "config.json: not JSON"),
    ("episodes.jsonl", b'{"turns": 3}\n', "line 1: turns is no list"),
    ("episodes.jsonl", b'{"turns": ["a"]}\n', "line 1: turns is no list"),
  ],
)
def test_garbled_files_are_one_clear_line(workdir, capsys, name, content, message):
  run_files.write_run(workdir, updates=2)
  (workdir / name).write_bytes(content)
  assert report.main([str(workdir)]) == 1
  error = capsys.readouterr().err
  assert error.startswith("rome report: ") and name in error and message in error
  assert error.count("\n") == 1
  assert not (workdir / "report.html").exists()


@pytest.mark.parametrize("missing", ["nowhere", "empty"])
def test_no_run_there(tmp_path, capsys, missing):
  (tmp_path / "empty").mkdir()
  assert report.main([str(tmp_path / missing)]) == 1
  assert capsys.readouterr().err.count("\n") == 1


def test_an_unwritable_target_is_one_clear_line(workdir, capsys):
  run_files.write_run(workdir, updates=2)
  (workdir / "report.html.partial").mkdir()
  assert report.main([str(workdir)]) == 1
  assert "cannot write" in capsys.readouterr().err


@pytest.mark.slow
def test_in_a_browser(workdir, tmp_path):
  """Chromium parses the page as meant: nothing hostile became markup or ran, charts have size."""
  write(workdir)
  names = ("chromium", "chromium-browser", "google-chrome")
  browser = next((path for path in map(shutil.which, names) if path), None)
  assert browser, "no Chromium; as root: apt-get install chromium (make test does it)"
  options = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
  )
  done = subprocess.run(
    [
      *(browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
      (workdir / "report.html").as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    env={**os.environ, "HOME": str(tmp_path)},
  )
  assert done.returncode == 0, done.stderr
  assert "<title>quickstart: a run of rome</title>" in done.stdout
  dom = Tags(done.stdout)
  assert dom.tags.count("svg") >= 17 and dom.tags.count("details") == 5
  assert not {"script", "img"} & set(dom.tags)
  assert sum("hacked" in word for word in dom.words) >= 3
