"""Small charts as inline SVG: lines with points and intervals, stacked shares, before/after rows.

Drawn by hand rather than by matplotlib, because colours then come from the page's style sheet
(light and dark alike), hovering a point tells its value without a script, and a page stays small.

Left out: anything interactive, and axes other than linear and logarithmic.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 380, 196
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
MAX_POINTS = 300  # A series is thinned to about this many points; a panel is 324 units wide.


@dataclasses.dataclass(frozen=True)
class Series:
  """One line of a chart.

  Attributes:
    label: name in the legend and in tooltips; "" keeps it out of the legend.
    xs, ys: the points, equally many; non-finite ones are left out.
    color: 1..4, a colour of the page.
    style: "line", "faint" (a thin pale line) or "points".
    intervals: (low, high) of each point, drawn as whiskers; empty for none.
  """

  label: str
  xs: Sequence[float]
  ys: Sequence[float]
  color: int = 1
  style: str = "line"
  intervals: Sequence[tuple[float, float]] = ()


def number(value: float, percent: bool = False) -> str:
  """A figure for people: three digits, powers of ten where they are shorter."""
  if percent:
    return f"{100 * value:.3g}\u00a0%"
  if value == 0:
    return "0"
  if 1e-3 <= abs(value) < 1e5:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
  mantissa, exponent = f"{value:.2e}".split("e")
  return f"{float(mantissa):g}e{int(exponent)}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """About `count` round numbers that cover [low, high]."""
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten that cover [low, high], at most about six; 1-2-5 where that is under a decade."""
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  if last - first <= 1:
    every = [m * 10.0**e for e in (first, last) for m in (1, 2, 5)]
    below = max(t for t in every if t <= low * 1.0001)
    above = min((t for t in every if t >= high * 0.9999), default=10.0 ** (last + 1))
    return [t for t in [*every, 10.0 ** (last + 1)] if below <= t <= above]
  stride = math.ceil((last - first) / 6)
  return [10.0**e for e in range(first, last + stride, stride)]


@dataclasses.dataclass(frozen=True)
class _Axes:
  """Maps data to the drawing: x and y ranges as the outermost ticks have them."""

  x_low: float
  x_high: float
  y_ticks: list[float]
  log: bool

  def x(self, value: float) -> float:
    span = (self.x_high - self.x_low) or 1.0
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / span

  def y(self, value: float) -> float:
    scale = math.log10 if self.log else float
    low, high = scale(self.y_ticks[0]), scale(self.y_ticks[-1])
    share = (scale(value) - low) / (high - low)
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(share, 0.0), 1.0)


def line_chart(
  series: Sequence[Series],
  *,
  log: bool = False,
  percent: bool = False,
  y_range: tuple[float, float] | None = None,
  title: str = "",
) -> str:
  """A chart of steps against values; "" where no series has a point that can be drawn.

  Args:
    series: drawn in this order.
    log: logarithmic y axis; points at or below zero are left out.
    percent: label y as percentages.
    y_range: y limits; by default those of the data.
    title: read out by screen readers.
  """
  drawn = [d for d in (_drawable(s, log) for s in series) if d.xs]
  if not drawn:
    return ""
  axes = _axes(drawn, log, y_range)
  parts = [_frame(axes, percent)]
  for one in drawn:
    parts.append(_draw(one, axes, percent))
  return _svg(parts, title)


def stacked_shares(
  xs: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]], title: str = ""
) -> str:
  """Shares of a whole over steps, stacked from below; colours 1, 2, ... in the order given."""
  if len(xs) < 2:
    return ""
  axes = _Axes(min(xs), max(xs), [0.0, 0.25, 0.5, 0.75, 1.0], log=False)
  parts, base = [_frame(axes, percent=True)], [0.0] * len(xs)
  for color, (label, values) in enumerate(layers, start=1):
    top = [b + v for b, v in zip(base, values, strict=True)]
    outline = [*zip(xs, top, strict=True), *reversed(list(zip(xs, base, strict=True)))]
    points = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in outline)
    name = html.escape(f"{label}: {number(sum(values) / len(values), True)} on average")
    parts.append(
      f'<polygon class="area c{color}" points="{points}"><title>{name}</title></polygon>'
    )
    base = top
  return _svg(parts, title)


def interval_bar(
  before: float | None,
  after: float | None,
  before_interval: tuple[float, float] | None,
  after_interval: tuple[float, float] | None,
) -> str:
  """One row on a scale of 0 to 1: a hollow dot before, a full dot after, whiskers for intervals."""
  x, height = _bar_x, 22
  parts = [f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="0" y2="22"/>' for t in _BAR_TICKS]
  for value, interval, y, kind in (
    (before, before_interval, 7, "before"),
    (after, after_interval, 15, "after"),
  ):
    if interval:
      low, high = interval
      parts.append(
        f'<line class="whisker {kind}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>'
      )
    if value is not None:
      parts.append(_dot(f"dot {kind}", x(value), y, f"{kind}: {number(value, True)}"))
  return _bar_svg(parts, height, "success before and after")


def interval_scale() -> str:
  """The scale of `interval_bar`, to stand above or below it."""
  labels = [
    f'<text x="{_bar_x(t)}" y="11" text-anchor="middle">{number(t, True)}</text>'
    for t in _BAR_TICKS
  ]
  return _bar_svg(labels, 14, "scale from 0 % to 100 %")


_BAR_WIDTH, _BAR_PAD, _BAR_TICKS = 300, 18, (0.0, 0.25, 0.5, 0.75, 1.0)


def _bar_x(share: float) -> float:
  return _BAR_PAD + (_BAR_WIDTH - 2 * _BAR_PAD) * min(max(share, 0.0), 1.0)


def _bar_svg(parts: Sequence[str], height: int, title: str) -> str:
  return (
    f'<svg class="bar" viewBox="0 0 {_BAR_WIDTH} {height}" width="{_BAR_WIDTH}" role="img" '
    f'aria-label="{title}">{"".join(parts)}</svg>'
  )


def _drawable(series: Series, log: bool) -> Series:
  """The series without points that cannot be drawn, thinned."""
  intervals = series.intervals or [(math.nan, math.nan)] * len(series.xs)
  points = [
    point
    for point in zip(series.xs, series.ys, intervals, strict=True)
    if math.isfinite(point[0]) and math.isfinite(point[1]) and not (log and point[1] <= 0)
  ]
  # The last point always stays: it is what people look for.
  stride = math.ceil(len(points) / MAX_POINTS) or 1
  points = points[(len(points) - 1) % stride :: stride] if points else []
  return dataclasses.replace(
    series,
    xs=[p[0] for p in points],
    ys=[p[1] for p in points],
    intervals=[p[2] for p in points] if series.intervals else (),
  )


def _axes(series: Sequence[Series], log: bool, y_range: tuple[float, float] | None) -> _Axes:
  xs = [x for s in series for x in s.xs]
  ys = [y for s in series for y in s.ys]
  low, high = y_range or (min(ys), max(ys))
  if log:
    y_ticks = log_ticks(low, high * 1.0001)
  else:
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):  # A flat line is shown against zero.
      low, high = min(0.0, 2 * low), max(0.0, 2 * high) or (1.0 if low == 0 else 0.0)
    y_ticks = ticks(low, high)
  return _Axes(min(xs), max(xs), y_ticks, log)


def _frame(axes: _Axes, percent: bool) -> str:
  """Grid lines and tick labels."""
  parts = []
  for tick in axes.y_ticks:
    y = axes.y(tick)
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    label = number(tick, percent)
    parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
  if axes.x_high > axes.x_low:
    x_ticks = [t for t in ticks(axes.x_low, axes.x_high, 5) if axes.x_low <= t <= axes.x_high]
  else:
    x_ticks = [axes.x_low]
  for tick in x_ticks:
    label = number(tick)
    parts.append(
      f'<text x="{axes.x(tick):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>'
    )
  return "".join(parts)


def _draw(series: Series, axes: _Axes, percent: bool) -> str:
  color = f"c{series.color}"
  parts = []
  points = [(axes.x(x), axes.y(y)) for x, y in zip(series.xs, series.ys, strict=True)]
  if series.style != "points":
    kind = "line" if series.style == "line" else "line faint"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="{kind} {color}" points="{path}"/>')
  for (x, _), (low, high) in zip(points, series.intervals or [], strict=False):
    if math.isfinite(low) and math.isfinite(high):
      ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(low):.1f}" y2="{axes.y(high):.1f}"'
      parts.append(f'<line class="whisker {color}" {ends}/>')
  if series.style != "faint":
    kind = "dot" if series.style == "points" or len(points) == 1 else "hover"
    for (x, y), step, value in zip(points, series.xs, series.ys, strict=True):
      name = f"{series.label} at step {number(step)}: {number(value, percent)}"
      parts.append(_dot(f"{kind} {color}", x, y, name))
  return "".join(parts)


def _dot(kind: str, x: float, y: float, tooltip: str) -> str:
  title = f"<title>{html.escape(tooltip)}</title>"
  return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'


def _svg(parts: Sequence[str], title: str) -> str:
  return (
    f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
    f'aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
  )
