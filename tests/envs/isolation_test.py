"""The escape suite: nothing gets out, neighbours notice nothing, and the detectors do detect."""

import dataclasses
import json

import pytest

from experiments.isolation_attacks import controls, report, runner, witness
from experiments.isolation_attacks.canaries import Canaries
from experiments.isolation_attacks.catalogue import ATTACKS
from experiments.isolation_attacks.neighbours import Neighbours


def _play(attacks, backend, count):
  witness.raise_descriptor_limit()
  with Canaries() as canaries, Neighbours(count, backend) as neighbours:
    with runner.Range(backend, None, neighbours, canaries) as where:
      outcomes, missing = runner.play_all(attacks, where)
    done = neighbours.summary()["jobs"]
  assert done > count, "the neighbours did no work"
  assert neighbours.errors == []
  bad = [(o.category, o.name, o.user, o.evidence) for o in outcomes if o.verdict != "contained"]
  assert bad == []
  return outcomes, missing


def test_the_catalogue_is_what_was_asked_for():
  names = [(attack.category, attack.language, attack.name) for attack in ATTACKS]
  assert len(set(names)) == len(names) >= 80
  assert {attack.language for attack in ATTACKS} == {"shell", "c", "python", "node", "host"}
  assert sum("root" in attack.users and "agent" in attack.users for attack in ATTACKS) >= 60


def test_quick_attacks_are_contained():
  quick = [
    dataclasses.replace(attack, users=attack.users[:1]) for attack in ATTACKS if attack.quick
  ]
  outcomes, missing = _play(quick, "bubblewrap", 1)
  assert len(outcomes) > 25 and not missing


@pytest.mark.parametrize(("name", "play"), controls._ANY, ids=[name for name, _ in controls._ANY])
def test_detectors_detect(name, play):
  with Canaries() as canaries:
    assert play(canaries, "bubblewrap"), f"nobody noticed: {name}"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "play"), controls._PODMAN, ids=[n for n, _ in controls._PODMAN])
def test_detectors_detect_what_weak_containers_do(name, play):
  with Canaries() as canaries:
    assert play(canaries, "podman"), f"nobody noticed: {name}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_attack_is_contained():
  outcomes, missing = _play(ATTACKS, "podman", 4)
  played = {(o.category, o.name, o.language) for o in outcomes}
  assert len(played) >= 60 and len(played) + len(missing) == len(ATTACKS)


def test_the_report_is_made_from_the_results_and_no_attacker_writes_in_it(tmp_path):
  outcome = runner.Outcome(
    "a|b", "kernel", "c", "root", "BREACH", "x", ("<script>\x1b]0;`x`",), 0.1
  )
  results = {
    "environment": report.environment("python -m experiments.isolation"),
    "backend": "podman", "outcomes": [dataclasses.asdict(outcome)], "missing": ["b (node)"],
    "controls": [{"name": "control", "noticed": "something"}], "replaced": 0,
    "neighbours": {"count": 8, "jobs": 5, "job_p50_s": 0.1, "job_max_s": 1.0, "quiet_p50_s": 0.1,
                   "bound_s": 20.0, "errors": []},
  }  # fmt: skip
  report.write(results, tmp_path)
  page = (tmp_path / "isolation.md").read_text()
  assert "**1 breaches.**" in page and "a/b" in page and "b (node)" in page
  assert "<script>" not in page and "\x1b" not in page
  assert json.loads((tmp_path / "isolation/results.json").read_text())["replaced"] == 0
