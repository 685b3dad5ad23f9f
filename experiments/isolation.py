"""The escape suite: attacks every sandbox must contain, while eight others do real work.

  python -m experiments.isolation --workdir=runs/isolation [--backend=podman --attacks=REGEX]

Attacks only sandboxes that it starts itself, and reaches for nothing but canaries that it lays out
itself. Leaves WORKDIR/isolation.md and WORKDIR/isolation/results.json; exits with status 1 if there
is a breach or if a control goes unnoticed.
"""

import dataclasses
import pathlib
import re
import sys
import time

from absl import app, flags

from experiments.isolation_attacks import controls, report, runner, witness
from experiments.isolation_attacks.canaries import Canaries
from experiments.isolation_attacks.catalogue import ATTACKS
from experiments.isolation_attacks.neighbours import JOB_BOUND, Neighbours
from rome.envs.sandbox import SandboxError

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
_BACKEND = flags.DEFINE_enum("backend", "podman", ["podman", "bubblewrap"], "What is attacked.")
_IMAGE = flags.DEFINE_string(
  "image", None, "Image of the sandboxes; one with python3 and node plays most."
)
_ATTACKS = flags.DEFINE_string(
  "attacks", "", "Only those whose 'category: name (language)' matches this regex."
)
_NEIGHBOURS = flags.DEFINE_integer("neighbours", 8, "Sandboxes that work meanwhile.", lower_bound=1)
_CONTROLS = flags.DEFINE_bool(
  "controls", True, "Prove first that the detectors work (Podman, root)."
)
_QUIET = 3.0  # seconds in which the neighbours work undisturbed


def _tell(outcome: runner.Outcome) -> None:
  found = f" {'; '.join(outcome.evidence)}" if outcome.evidence else ""
  line = (
    f"{outcome.verdict:9} {outcome.seconds:5.1f} s  {outcome.category}: {outcome.name} "
    f"({outcome.language}, {outcome.user}): {outcome.reason}{found}"
  )
  print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr, flush=True)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  witness.raise_descriptor_limit()
  chosen = [
    a for a in ATTACKS if re.search(_ATTACKS.value, f"{a.category}: {a.name} ({a.language})")
  ]
  if not chosen:
    sys.exit(f"error: no attack matches --attacks={_ATTACKS.value!r}")
  command = "python -m experiments.isolation " + " ".join(
    arg for arg in sys.argv[1:] if not arg.startswith("--workdir")
  )
  try:
    with (
      Canaries() as canaries,
      Neighbours(_NEIGHBOURS.value, _BACKEND.value, _IMAGE.value) as neighbours,
    ):
      time.sleep(_QUIET)
      quiet = neighbours.summary()["job_p50_s"]
      proofs = controls.run_all(_BACKEND.value) if _CONTROLS.value else []
      neighbours.seconds.clear()
      with runner.Range(_BACKEND.value, _IMAGE.value, neighbours, canaries) as where:
        outcomes, missing = runner.play_all(chosen, where, _tell)
        replaced = where.replaced
      work = neighbours.summary()
      errors = list(neighbours.errors)
  except SandboxError as error:
    sys.exit(f"error: {error}")
  results = {
    "environment": report.environment(command.strip()),
    "backend": _BACKEND.value,
    "outcomes": [dataclasses.asdict(one) for one in outcomes],
    "controls": [dataclasses.asdict(one) for one in proofs],
    "missing": missing,
    "replaced": replaced,
    "neighbours": {
      "count": _NEIGHBOURS.value, **work, "quiet_p50_s": quiet, "bound_s": JOB_BOUND,
      "errors": errors,
    },
  }  # fmt: skip
  report.write(results, pathlib.Path(_WORKDIR.value))
  breaches = sum(one.verdict != "contained" for one in outcomes)
  unseen = sum(not one.noticed for one in proofs)
  print(f"{len(outcomes)} runs, {breaches} breaches, {len(errors)} effects on neighbours, "
        f"{len(proofs)} controls, {unseen} unnoticed")  # fmt: skip
  sys.exit(1 if breaches or errors or unseen else 0)


if __name__ == "__main__":
  app.run(main)
