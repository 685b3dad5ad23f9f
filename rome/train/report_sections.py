"""The sections of report.html, each a function from what a run left to HTML.

Everything that came out of a run goes through `page.text` on its way into the page: names of
families and settings as well as what a model or a tool wrote.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rome.train import charts
from rome.train import report_page as page
from rome.train.charts import Series
from rome.train.metrics import MISMATCH_PARTS, is_number

MAX_EPISODES = 40
SMOOTH = 5  # Steps in the trailing mean over the noisy success of single batches.

Row = Mapping[str, Any]
Interval = tuple[float, float] | None


def header(title: str, summary: Row, rows: Sequence[Row], starts: Sequence[Row]) -> str:
  """Title, one line of provenance, and a note where the run has not finished."""
  about = summary or (starts[-1] if starts else {})
  names = (
    *(("date", ""), ("time", "started "), ("device", "")),
    *(("sandbox_backend", "sandboxes: "), ("seed", "seed ")),
  )
  facts = [prefix + str(about[name]) for name, prefix in names if name in about]
  lines = [f"<h1>{page.text(title)}</h1>", f'<p class="muted">{page.text(" · ".join(facts))}</p>']
  if not summary:
    last = next((row for row in reversed(rows) if row["phase"] != "alarm"), rows[-1])
    lines.append(
      f'<p class="note">This run has not finished (no summary.json). It is in phase '
      f"{page.text(last['phase'])}, step {page.text(last['step'])}; figures are those so far.</p>"
    )
  return "\n".join(lines + _alarms(rows))


def _alarms(rows: Sequence[Row]) -> list[str]:
  """A note where an alarm spoke: each rule with the updates at which it did."""
  spoken: dict[str, list[str]] = {}
  for row in rows:
    if row["phase"] == "alarm":
      kind = "stopped at" if row.get("stop") else "warned at"
      spoken.setdefault(f"{row.get('rule')} {kind}", []).append(str(row["step"]))
  if not spoken:
    return []
  said = "; ".join(f"{name} update {', '.join(steps)}" for name, steps in spoken.items())
  return [f'<p class="note">Alarms: {page.text(said)}.</p>']


def headline(summary: Row, rows: Sequence[Row]) -> str:
  """Success before and after, and what the run cost."""
  before, after = _rates(summary, rows)
  parts = [f'<div class="card">{_success(before, after)}</div>']
  facts = _facts(summary, rows)
  if facts:
    items = "".join(
      f"<div><dt>{page.text(name)}</dt><dd>{page.text(value)}</dd></div>" for name, value in facts
    )
    parts.append(f'<div class="card"><dl class="facts">{items}</dl></div>')
  return f'<section class="headline">{"".join(parts)}</section>'


def families(summary: Row, rows: Sequence[Row]) -> str:
  """Success of each family, before and after."""
  table = summary.get("families") or _families_of_rows(rows)
  if not table:
    return ""
  body = []
  for name, family in sorted(table.items()):
    before, after = family.get("before"), family.get("after")
    low_high = _interval(family.get("before_interval")), _interval(family.get("after_interval"))
    body.append(
      f"<tr><td>{page.text(name)}</td><td class='right'>{page.text(family.get('n', ''))}</td>"
      f"{_rate_cells(before, low_high[0])}{_rate_cells(after, low_high[1])}"
      f"<td>{charts.interval_bar(before, after, *low_high)}</td></tr>"
    )
  head = (
    "<tr><th>family</th><th class='right'>instances</th><th class='right'>before RL</th><th></th>"
    f"<th class='right'>after RL</th><th></th><th>{charts.interval_scale()}</th></tr>"
  )
  return (
    "<section><h2>Held-out success by family</h2>"
    '<p class="muted">Same instances and sampling before and after; ranges are 95 % intervals.</p>'
    f'<div class="card scroll"><table>{head}{"".join(body)}</table></div></section>'
  )


def curves(rows: Sequence[Row]) -> str:
  """One small chart for each question people ask of a run; those without data are left out."""
  rl = [row for row in rows if row["phase"] == "rl"]
  sft = [row for row in rows if row["phase"] == "sft"]
  panels = [
    _panel(
      "Success",
      [
        _series(rl, "success", "each batch", 1, "faint"),
        _trailing_mean(_series(rl, "success", f"batches, mean of {SMOOTH}", 1)),
        _evaluations(rows, rl),
      ],
      percent=True,
      y_range=(0, 1),
    ),
    _panel(
      "Gradient norm, before clipping", [_series(rl, "grad_norm", "gradient norm", 1)], log=True
    ),
    _panel(
      "Reply length, tokens",
      [
        _series(rl, "reply_length_positive", "successful episodes", 3),
        _series(rl, "reply_length_negative", "failed episodes", 2),
      ],
    ),
    _panel(
      "Sampler against trainer, |log-ratio|",
      [_series(rl, "mismatch_max", "largest", 4), _series(rl, "mismatch_mean", "mean", 1)],
      log=True,
    ),
    _panel(
      "Sampler against trainer, mean by place in the row",
      [
        _series(rl, f"mismatch_part_{p}", f"{100 * p // MISMATCH_PARTS} % on", p + 1)
        for p in range(MISMATCH_PARTS)
      ],
      log=True,
    ),
    _panel("Entropy, nats a token", [_series(rl, "entropy", "entropy", 1)]),
    _panel(
      "Share of tokens or chunks left out",
      [_series(rl, "masked_share", "masked", 1), _series(rl, "truncated_share", "truncated", 2)],
      percent=True,
    ),
    _panel(
      "Trajectories left out",
      [
        _series(rl, "invalid", "invalid", 2),
        _series(rl, "filtered", "filtered groups", 1),
        _series(rl, "redundant", "redundant", 3),
      ],
    ),
    _share_panel(rl),
    _panel(
      "Speed, tokens a second",
      [
        _series(rl, "tokens_per_s_sampled", "sampled", 1),
        _series(rl, "tokens_per_s_trained", "trained", 2),
      ],
      log=True,
    ),
    _panel("Warm start: loss, nats a token", [_series(sft, "loss", "loss", 1)], log=True),
    _panel(
      "Warm start: accuracy, held-out success",
      [_series(sft, "accuracy", "token accuracy", 4), _plateau(rows)],
      percent=True,
      y_range=(0, 1),
    ),
  ]
  drawn = [p for p in panels if p]
  if not drawn:
    return ""
  return (
    "<section><h2>Curves</h2>"
    '<p class="muted">Over updates of the stage. Point at a curve for its values.</p>'
    f'<div class="charts">{"".join(drawn)}</div></section>'
  )


def timeline(marks: Sequence[Row]) -> str:
  """Idle shares of each update, and where the whole timeline is."""
  rl = [
    mark
    for mark in marks
    if mark.get("phase") == "rl" and all(is_number(mark.get(f"idle_{n}")) for n in _WORKERS)
  ]
  found = {mark["step"]: mark for mark in rl if is_number(mark.get("step"))}  # the newest of each
  rows = [found[step] for step in sorted(found)]
  panel = _panel(
    "Idle share of an update's time",
    [_series(rows, f"idle_{name}", name, color) for color, name in enumerate(_WORKERS, start=1)],
    percent=True,
    y_range=(0, 1),
  )
  if not panel:
    return ""
  return (
    "<section><h2>Timeline</h2>"
    '<p class="muted">What ran when is in timeline.json, which ui.perfetto.dev opens.</p>'
    f'<div class="charts">{panel}</div></section>'
  )


_WORKERS = ("engine", "trainer", "environments")


def transcripts(episodes: Sequence[Row]) -> str:
  """A few episodes as conversations, the newest first."""
  if not episodes:
    return ""
  shown = list(reversed(episodes))[:MAX_EPISODES]
  kept = "" if len(shown) == len(episodes) else f" Newest {len(shown)} of {len(episodes)}."
  items = "".join(_episode(one, index == 0) for index, one in enumerate(shown))
  return (
    "<section><h2>Episodes</h2>"
    f'<p class="muted">What the policy wrote and what its sandbox answered.{kept}</p>'
    f"{items}</section>"
  )


def settings(summary: Row, config: Row, starts: Sequence[Row]) -> str:
  """Everything needed to run it again, and the summary as it was written."""
  parts = [
    f"<details><summary>{name}</summary><pre>"
    f"{page.text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False))}</pre></details>"
    for name, value in (("Summary", summary), ("Settings", config), ("Starts", starts))
    if value
  ]
  if not parts:
    return ""
  table = _starts(starts)
  commit = f"Commit {summary['commit']}. " if summary.get("commit") else ""
  checkpoint = f"Checkpoint {summary['checkpoint']}." if summary.get("checkpoint") else ""
  return (
    f'<section class="settings"><h2>Run</h2><p class="muted">{page.text(commit + checkpoint)}</p>'
    f"{table}{''.join(parts)}</section>"
  )


def _starts(starts: Sequence[Row]) -> str:
  """A row for each start: where it took the run up, under what."""
  if not starts:
    return ""
  body = []
  for start in starts:
    packages = start.get("versions")
    packages = packages if isinstance(packages, dict) else {}
    cells = (
      *(start.get("time", ""), f"{start.get('phase', '')} {start.get('update', '')}"),
      *(start.get("commit", ""), start.get("device", "")),
      *(packages.get("jax", ""), packages.get("python", "")),
      str(start.get("settings_sha256", ""))[:12],
    )
    body.append("<tr>" + "".join(f"<td>{page.text(cell)}</td>" for cell in cells) + "</tr>")
  names = ("started", "from update", "commit", "device", "jax", "Python", "settings")
  head = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
  return f'<div class="card scroll"><table>{head}{"".join(body)}</table></div>'


def _rates(summary: Row, rows: Sequence[Row]) -> list[tuple[float | None, Interval, Any]]:
  """(rate, interval, n) before and after RL: of the summary, or of the newest such evaluation."""
  found = []
  for name in ("before", "after"):
    row = next((r for r in reversed(rows) if r["phase"] == "eval" and r.get("name") == name), {})
    rate = summary.get(f"success_{name}", row.get("success"))
    rate = rate if is_number(rate) else None
    interval = _interval(summary.get(f"success_{name}_interval", [row.get("low"), row.get("high")]))
    found.append((rate, interval, summary.get("instances", row.get("n"))))
  return found


def _success(before: tuple[Any, Interval, Any], after: tuple[Any, Interval, Any]) -> str:
  title = '<div class="muted">Success on held-out instances</div>'
  if before[0] is None and after[0] is None:
    return f'{title}<div class="big">–</div><p class="muted">not evaluated yet</p>'
  first = charts.number(before[0], True) if before[0] is not None else "–"
  last = charts.number(after[0], True) if after[0] is not None else "…"
  ranges = " → ".join(_range(interval) or "–" for _, interval, _ in (before, after))
  n = after[2] or before[2]
  instances = f"; {n} instances" if n else ""
  return (
    f'{title}<div class="big"><span class="from">{first} →</span> {last}</div>'
    f'<p class="muted">95 % intervals {page.text(ranges + instances)}</p>'
    f"{charts.interval_bar(before[0], after[0], before[1], after[1])}{charts.interval_scale()}"
  )


def _facts(summary: Row, rows: Sequence[Row]) -> list[tuple[str, str]]:
  """Names and figures of the card beside the headline."""
  facts = []
  wall = summary.get("wall_seconds", rows[-1].get("wall"))
  if is_number(wall):
    facts.append(("wall time", f"{int(wall) // 60} min {int(wall) % 60:02d} s"))
  if summary.get("peak_rss_mb") is not None:
    facts.append(("peak memory", f"{summary['peak_rss_mb'] / 1024:.2f} GiB"))
  updates = [sum(row["phase"] == phase for row in rows) and _last(rows, phase) for phase in _STAGES]
  facts += [
    (f"{_STAGES[phase]} updates", charts.number(step))
    for phase, step in zip(_STAGES, updates, strict=True)
    if step
  ]
  for name, value in (summary.get("speeds") or {}).items():
    facts.append((name.replace("_per_s", " / s").replace("_", " "), charts.number(value)))
  for name, value in (summary.get("stage_shares") or {}).items():
    facts.append((f"time: {name.removeprefix('share_')}", charts.number(value, True)))
  return facts


_STAGES = {"sft": "warm-start", "rl": "RL"}


def _last(rows: Sequence[Row], phase: str) -> float:
  return max(row["step"] for row in rows if row["phase"] == phase)


def _families_of_rows(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
  """The family table of a run that wrote no summary yet: rates without intervals."""
  table: dict[str, dict[str, Any]] = {}
  for row in rows:
    if row["phase"] == "eval" and row.get("name") in ("before", "after"):
      for key, value in row.items():
        if key.startswith("family_") and is_number(value):
          table.setdefault(key.removeprefix("family_"), {})[row["name"]] = value
  return table


def _series(rows: Sequence[Row], name: str, label: str, color: int, style: str = "line") -> Series:
  points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
  return Series(label, [p[0] for p in points], [p[1] for p in points], color, style)


def _trailing_mean(series: Series) -> Series:
  ys = series.ys
  windows = [ys[max(0, i + 1 - SMOOTH) : i + 1] for i in range(len(ys))]
  return Series(series.label, series.xs, [sum(w) / len(w) for w in windows], series.color)


def _evaluations(rows: Sequence[Row], rl: Sequence[Row]) -> Series:
  """Held-out success before and after, at the two ends of RL."""
  ends = {"before": 0, "after": max((row["step"] for row in rl), default=0)}
  found = [row for row in rows if row["phase"] == "eval" and row.get("name") in ends]
  return _evaluation_series(found, [ends[row["name"]] for row in found])


def _plateau(rows: Sequence[Row]) -> Series:
  """Held-out success during the warm start and at its end, on the warm start's own steps."""
  found = [
    row
    for row in rows
    if row["phase"] == "eval" and str(row.get("name")).startswith(("plateau", "before"))
  ]
  return _evaluation_series(found, [row["step"] for row in found])


def _evaluation_series(rows: Sequence[Row], steps: Sequence[float]) -> Series:
  kept = [(r, s) for r, s in zip(rows, steps, strict=True) if is_number(r.get("success"))]
  intervals = [_interval([r.get("low"), r.get("high")]) or (float("nan"),) * 2 for r, _ in kept]
  return Series(
    "held-out", [s for _, s in kept], [r["success"] for r, _ in kept], 2, "points", intervals
  )


def _panel(title: str, series: Sequence[Series], **options: Any) -> str:
  chart = charts.line_chart(series, title=title, **options)
  if not chart:
    return ""
  legend = _legend([(s.label, s.color) for s in series if s.xs and s.style != "faint"])
  scale = ' <span class="muted">(log)</span>' if options.get("log") else ""
  return f'<div class="card"><h3>{page.text(title)}{scale}</h3>{legend}{chart}</div>'


def _share_panel(rl: Sequence[Row]) -> str:
  names = ("generate", "env", "train", "other")
  found = [row for row in rl if all(is_number(row.get(f"share_{name}")) for name in names)]
  title = "Share of time in each stage"
  chart = charts.stacked_shares(
    [row["step"] for row in found],
    [(name, [row[f"share_{name}"] for row in found]) for name in names],
    title,
  )
  if not chart:
    return ""
  legend = _legend([(name, color) for color, name in enumerate(names, start=1)])
  return f'<div class="card"><h3>{title}</h3>{legend}{chart}</div>'


def _legend(entries: Sequence[tuple[str, int]]) -> str:
  spans = "".join(
    f'<span><i class="swatch c{color}"></i>{page.text(label)}</span>' for label, color in entries
  )
  return f'<div class="legend">{spans}</div>'


def _episode(episode: Row, is_open: bool) -> str:
  success = episode.get("success")
  if success is None:
    kind, verdict = "none", "invalid"
  else:
    kind, verdict = ("good", "passed") if success else ("bad", "failed")
  about = " · ".join(
    str(episode[name]) for name in ("phase", "end_reason") if episode.get(name) is not None
  )
  step = f" · step {episode['step']}" if episode.get("step") is not None else ""
  said = [_said("user", "task", episode.get("instruction", ""))]
  for turn in episode["turns"]:
    code = turn.get("exit_code")
    result = "sandbox" if code is None else f"sandbox, exit code {code}"
    said.append(_said("model", "policy", turn.get("action", "")))
    said.append(_said("tool", result, turn.get("observation", "")))
  return (
    f"<details{' open' if is_open else ''}><summary><b>{page.text(episode.get('task_id', ''))}</b>"
    f'<span class="badge {kind}">{verdict}</span>'
    f'<span class="muted">{page.text(about + step)}</span></summary>'
    f'<div class="chat">{"".join(said)}</div></details>'
  )


def _said(kind: str, who: str, words: object) -> str:
  if kind == "tool" and not words:
    words = "(no output)"
  return (
    f'<div class="said {kind}"><div class="who">{page.text(who)}</div>'
    f"<pre>{page.text(words)}</pre></div>"
  )


def _rate_cells(rate: float | None, interval: Interval) -> str:
  shown = "–" if rate is None else charts.number(rate, True)
  return f"<td class='right'>{shown}</td><td class='range'>{_range(interval)}</td>"


def _range(interval: Interval) -> str:
  return f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f}\u00a0%" if interval else ""


def _interval(value: Any) -> Interval:
  """(low, high) of a JSON pair; None where either end is missing."""
  if not value or not all(map(is_number, value)):
    return None
  return value[0], value[1]
