"""Ticks, scales and the handling of points that cannot be drawn."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from rome.train import charts
from rome.train.charts import Series


@pytest.mark.parametrize(
  "value, shown",
  [(0, "0"), (0.5, "0.5"), (1234.4, "1,234"), (-3, "-3"), (1e-4, "1e-4"), (123456.0, "1.23e5")],
)
def test_number(value, shown):
  assert charts.number(value) == shown


def test_percent():
  assert charts.number(0.975, percent=True) == "97.5\u00a0%"


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 7.7), (1e-7, 3e-7), (900, 950)])
def test_ticks_cover_the_data_and_are_few(low, high):
  found = charts.ticks(low, high)
  assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
  assert 3 <= len(found) <= 7


@pytest.mark.parametrize("low, high", [(0.01, 100), (1e-9, 1e6), (2, 3), (1, 1), (0.02, 0.4)])
def test_log_ticks_cover_the_data_and_are_few(low, high):
  found = charts.log_ticks(low, high)
  assert found[0] <= low and found[-1] >= high
  assert 2 <= len(found) <= 8


def points(svg: str) -> list[tuple[float, float]]:
  text = re.search(r'<polyline[^>]*points="([^"]*)"', svg).group(1)
  return [tuple(map(float, pair.split(","))) for pair in text.split()]


def test_linear_scale():
  drawn = points(charts.line_chart([Series("a", [0, 5, 10], [0, 0.5, 1])], y_range=(0, 1)))
  left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
  top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
  assert drawn == [(left, bottom), ((left + right) / 2, (top + bottom) / 2), (right, top)]


def test_log_scale_spaces_decades_evenly():
  drawn = points(charts.line_chart([Series("a", [0, 1, 2], [0.01, 1, 100])], log=True))
  ys = [y for _, y in drawn]
  assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_what_cannot_be_drawn_is_left_out():
  values = [1.0, math.nan, math.inf, 0.0, -1.0, 2.0]
  assert len(points(charts.line_chart([Series("a", range(6), values)]))) == 4
  assert len(points(charts.line_chart([Series("a", range(6), values)], log=True))) == 2


@pytest.mark.parametrize("values", [[], [math.nan], [0.0]])
def test_nothing_to_draw_is_no_chart(values):
  assert charts.line_chart([Series("a", range(len(values)), values)], log=True) == ""


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [1e-9, 1e-9], [7, 7, 7], [-2.0, -2.0]])
def test_flat_and_single_points_are_drawn(values):
  svg = charts.line_chart([Series("a", range(len(values)), values)])
  ET.fromstring(svg)
  assert len(points(svg)) == len(values)


@pytest.mark.parametrize(
  "value, labels", [(0.0, {"0", "1"}), (3.0, {"0", "6"}), (-3.0, {"-6", "0"}), (1e-30, {"0"})]
)
def test_a_flat_line_is_shown_against_zero(value, labels):
  root = ET.fromstring(charts.line_chart([Series("a", [10, 20], [value, value])]))
  assert labels <= {text.text for text in root.findall("text")}


def test_long_series_are_thinned_and_keep_their_last_point():
  svg = charts.line_chart([Series("a", range(10_001), range(10_001))])
  assert len(points(svg)) <= charts.MAX_POINTS
  assert "step 1e4: 10,000" in svg or "step 10,000: 10,000" in svg


def test_whiskers_and_labels():
  one = Series("held-out <b>", [0, 1], [0.4, 0.9], 2, "points", [(0.3, 0.5), (math.nan, 1.0)])
  root = ET.fromstring(charts.line_chart([one], percent=True, title='"quoted" & more'))
  assert len(root.findall("line[@class='whisker c2']")) == 1
  assert root.find("circle/title").text == "held-out <b> at step 0: 40\u00a0%"
  assert root.get("aria-label") == '"quoted" & more'


def test_stacked_shares_fill_the_frame():
  svg = charts.stacked_shares([0, 1], [("a", [0.25, 0.75]), ("b", [0.75, 0.25])])
  polygons = ET.fromstring(svg).findall("polygon")
  assert len(polygons) == 2
  ys = {p.split(",")[1] for p in polygons[1].get("points").split()[:2]}
  assert ys == {f"{charts.TOP:.1f}"}


def test_interval_bar_puts_values_on_one_scale():
  root = ET.fromstring(charts.interval_bar(0.0, 1.0, None, (0.5, 1.0)))
  dots = {c.get("class"): float(c.get("cx")) for c in root.findall("circle")}
  grid = [float(line.get("x1")) for line in root.findall("line[@class='grid']")]
  assert dots["dot before"] == min(grid) and dots["dot after"] == max(grid)
  assert len(root.findall("line[@class='whisker after']")) == 1
  assert len(root.findall("line[@class='whisker before']")) == 0
