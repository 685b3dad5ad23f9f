"""Alarms: each rule speaks when it should, once a streak, and never on a healthy run."""

import dataclasses
import json

import pytest

from rome.train import alarms
from rome.train.alarms import AlarmsConfig, Bounds, check

HEALTHY = {
  "grad_norm": 0.2, "entropy": 0.1, "success": 0.5, "reply_length_negative": 18.0,
  "mismatch_mean": 1e-7, "filtered_share": 0.0, "masked_share": 0.0, "invalid_share": 0.0,
}  # fmt: skip
# What each rule reads, and a value beyond its default warning bound.
BAD = {
  "grad_norm": {"grad_norm": 11.0},
  "entropy": {"entropy": 0.004},
  "length": {"reply_length_negative": 37.0},
  "mismatch": {"mismatch_mean": 0.06},
  "filtered": {"filtered_share": 0.61},
  "masked": {"masked_share": 0.26},
  "invalid": {"invalid_share": 0.11},
}


DEFAULT = AlarmsConfig()


def play(rows, config=DEFAULT, state=None):
  """(update, rule, stop) of what is said over rows."""
  state = {} if state is None else state
  return [
    (update, alarm.rule, alarm.stop)
    for update, row in enumerate(rows, start=1)
    for alarm in check(config, row, state)
  ]


def only(name, **bounds):
  return dataclasses.replace(AlarmsConfig(), **{name: Bounds(**bounds)})


def test_every_rule_has_its_bounds_and_the_other_way_round():
  names = [rule.name for rule in alarms.rules(AlarmsConfig())]
  assert names == [field.name for field in dataclasses.fields(AlarmsConfig)] == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_a_rule_warns_once_a_streak(name):
  updates = getattr(AlarmsConfig(), name).updates
  bad, start = HEALTHY | BAD[name], [HEALTHY] * 5
  assert play([*start, *[bad] * (updates - 1), HEALTHY, *[bad] * (updates - 1)]) == []
  said = play([*start, *[bad] * 20, HEALTHY, *[bad] * updates])
  first, second = 5 + updates, 26 + updates
  assert [s for s in said if not s[2]] == [(first, name, False), (second, name, False)]


def test_what_a_row_lacks_ends_a_streak():
  bad, gap = HEALTHY | BAD["length"], {k: v for k, v in HEALTHY.items() if "length" not in k}
  assert play([HEALTHY] * 5 + [bad, bad, gap, bad, bad]) == []


def test_growth_is_against_the_first_updates_that_had_failures():
  gap = {k: v for k, v in HEALTHY.items() if "length" not in k}
  late = [HEALTHY | {"reply_length_negative": 40.0}] * 9
  assert play([gap] * 3 + [HEALTHY] * 5 + late) == [(11, "length", False)]
  assert play(late) == []


def test_certainty_is_no_collapse_where_the_tasks_are_solved():
  sure = HEALTHY | {"entropy": 1e-4}
  assert play([sure | {"success": 0.85}] * 9) == []
  assert play([sure | {"success": 0.79}] * 9) == [(3, "entropy", False)]


def test_a_stop_needs_its_own_streak_and_holds_as_long_as_that():
  config = only("grad_norm", warn=1.0, stop=5.0, updates=2)
  rows = [HEALTHY | {"grad_norm": x} for x in (2, 2, 6, 2, 6, 6, 6, 0.1, 6)]
  assert play(rows, config) == [
    (2, "grad_norm", False), (6, "grad_norm", True), (7, "grad_norm", True),
  ]  # fmt: skip


def test_a_rule_that_is_off_is_silent():
  rows = [HEALTHY | {"mismatch_mean": 50.0}] * 9
  assert (3, "mismatch", True) in play(rows)
  assert play(rows, only("mismatch", warn=0.1, stop=1.0, updates=0)) == []
  assert [s for s in play(rows, only("mismatch", warn=0.1)) if s[2]] == []


@pytest.mark.parametrize("cut", range(12))
def test_the_state_survives_wherever_it_is_cut(cut):
  rows = [HEALTHY] * 3 + [HEALTHY | BAD["length"] | BAD["masked"]] * 6 + [HEALTHY] * 3
  state = {}
  first = play(rows[:cut], state=state)
  state = json.loads(json.dumps(state))
  rest = [(u + cut, *said) for u, *said in play(rows[cut:], state=state)]
  assert first + rest == play(rows)
  assert play(rows)


def test_a_healthy_run_is_never_warned():
  """As the quickstart goes: entropy falls to nothing, failures get rare and their length noisy."""
  rows = []
  for update in range(120):
    success = min(0.3 + 0.012 * update, 0.98)
    rows.append({
      "grad_norm": 0.28 * (1 - success) + 0.05 * (update % 7),
      "entropy": 0.11 * (1 - success) + 0.001,
      "success": success,
      "reply_length_negative": None if update % 30 == 29 else 18.4 + (12.6 if update > 80 else 3)
      * (update % 3 == 0),
      "mismatch_mean": 3e-7, "filtered_share": 0.0, "masked_share": 0.0, "invalid_share": 0.0,
    })  # fmt: skip
  assert play(rows) == []


def test_the_row_and_the_line_say_which_bound():
  state: dict = {}
  (alarm,) = [a for _ in range(3) for a in check(AlarmsConfig(), HEALTHY | BAD["masked"], state)]
  assert alarm.row() == {
    "rule": "masked", "value": 0.26, "bound": 0.25, "updates": 3, "stop": False,
  }  # fmt: skip
  assert alarm.text == (
    "alarm masked: share of masked chunks is 0.26, above alarms.masked.warn=0.25 for 3 updates in "
    "a row"
  )


@pytest.mark.parametrize(
  ("bounds", "message"),
  [({"warn": 1.0, "updates": -1}, "updates must be at least 0"), ({"warn": float("nan")}, "warn")],
)
def test_mistaken_bounds(bounds, message):
  with pytest.raises(ValueError, match=message):
    Bounds(**bounds)
