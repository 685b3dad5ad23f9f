"""Runs jobs through XManager's local executor, so that they appear in its database and viewers.

XManager needs another protobuf than orbax: install it in an environment of its own, run
`launch.sweep` there, and name the interpreter that has rome with --python.
"""

import sys
from collections.abc import Sequence

from launch.local import DONE, SKIPPED, Job, Result


class XManagerMissing(RuntimeError):
  """XManager is not installed in this environment."""


def launch(title: str, jobs: Sequence[Job]) -> list[Result]:
  """Runs the jobs that are not done yet, all at once, and waits for them.

  XManager keeps the exit codes of local jobs to itself; a job counts as done when its summary.json
  is there.

  Raises:
    XManagerMissing: there is no xmanager.
  """
  try:
    from xmanager import xm, xm_local
  except ImportError as error:
    raise XManagerMissing(
      f"--launcher=xm_local needs xmanager ({error}). It wants an environment of its own: "
      "python3 -m venv .venv-xm && .venv-xm/bin/pip install xmanager absl-py"
    ) from error
  before = {job.name for job in jobs if job.done}
  try:
    with xm_local.create_experiment(experiment_title=title) as experiment:
      for job in jobs:
        if job.name not in before:
          spec = xm_local.Local.Spec()
          binary = xm.binary(executor_spec=spec, path=job.command[0], args=job.command[1:])
          [executable] = experiment.package([binary])
          experiment.add(xm.Job(executable, executor=xm_local.Local(), name=job.name))
  except RuntimeError as error:
    # What XManager raises, after all jobs have ended, for the first that failed.
    if all(job.done for job in jobs):
      raise
    print(f"launch: {error}", file=sys.stderr)
  return [
    Result(job, SKIPPED if job.name in before else DONE if job.done else "failed", None)
    for job in jobs
  ]
