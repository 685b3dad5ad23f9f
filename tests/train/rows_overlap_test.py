"""Whole runs whose agent rewrites its context while rollout goes on beside the updates."""

import pytest

from rome.train.checkpoints import Checkpoints
from tests.train.loop_test import environment, fails_with_one_line, rows_of, run, start, wait_until
from tests.train.overlap_test import FLAGS as OVERLAP
from tests.train.overlap_test import UPDATES, check_ledger
from tests.train.rows_run_test import FLAGS as ROWS

__all__ = ["environment"]
pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_rows_of_several_versions_are_trained_on_once(environment, tmp_path):
  """Also over a kill; and what it had played is told where it cannot be read."""
  process = start(environment, tmp_path, *OVERLAP, *ROWS)
  wait_until(process, lambda: len(rows_of(tmp_path, "rl")) >= 3, "row 3 of rl", timeout=200)
  process.kill()
  process.communicate()

  newest = Checkpoints(tmp_path, 2).steps()[-1]
  buffer = tmp_path / "updates" / f"buffer_{newest}.npz"
  whole = buffer.read_bytes()
  buffer.write_bytes(whole[: len(whole) // 2])
  fails_with_one_line(run(environment, tmp_path, *OVERLAP, *ROWS), f"{buffer} is damaged")
  buffer.write_bytes(whole)

  done = run(environment, tmp_path, *OVERLAP, *ROWS)
  assert done.returncode == 0 and "resuming" in done.stdout, done.stderr
  dropped, gaps = check_ledger(tmp_path)
  assert len(gaps) == dropped
  rows = rows_of(tmp_path, "rl")
  assert [row["step"] for row in rows] == list(range(1, UPDATES + 1))
  assert any(row["staleness"] > 0 for row in rows)
  for row in rows:
    # Each chunk against the weights of its own version, in whichever row it is.
    assert row["rows_per_episode"] > 1.5 and row["mismatch_max"] < 1e-4 and row["grad_norm"] > 0
