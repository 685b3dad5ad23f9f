"""Episodes on the hosts of a real Ray cluster, in a network namespace of its own."""

import pathlib

import pytest

from rome.rollout import WorkersConfig
from tests.envs.fleet_test import run_cases

CASES = pathlib.Path(__file__).with_name("workers_cases.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cases_in_a_cluster_without_a_way_out():
  run_cases(CASES, 560)


def test_settings():
  with pytest.raises(ValueError, match="workers.slots must be at least 1 with workers.address"):
    WorkersConfig(address="auto")
  with pytest.raises(ValueError, match="workers.slots must be 0 without workers.address, got 4"):
    WorkersConfig(slots=4)
