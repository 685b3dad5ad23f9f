"""The report of the escape suite: JSON, and a page of Markdown that is made from it alone."""

import datetime
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

_TEXT = """\
# Isolation: what was attacked, and what came of it

`{command}`, commit {commit}, {device}, {date}. This page and `isolation/results.json` beside it are written by
that program.

{attacks} attacks were played in {plays} runs, as the agent and as root inside, from {languages}, while {neighbours} other
sandboxes did real work. **{breaches} breaches.** {lost} sandboxes ended under attack, each declared with its reason and
replaced. Neighbours did {jobs} jobs: {wrong} wrong or lost; a job took {p50:.0f} ms at the median and {max:.1f} s at most
(quiet: {quiet:.0f} ms; bound: {bound:.0f} s).

A run is a breach if the witness, which looks from the host, sees that a canary was touched (a file, a process, a loop
device, the kernel log, services on the host's loopback and unix sockets: all open to everybody and all known to the
attacker), that a kernel setting, mount, the clock or the host's capacity changed, that the server in the sandbox was
stopped, traced or altered, that a process inside has more privileges than it may, or that a limit did not hold; if a
neighbour's result is wrong, lost or late; if a call of the host returned something untrue or an undeclared error; and if
the attack claims a success itself, which counts against the sandbox and never for it. "Contained" gives the reason in the
product's words.

## Attacks

| category | attack | language | as | outcome | reason |
| --- | --- | --- | --- | --- | --- |
{rows}
{findings}
## Controls: the detectors work

The same payloads where they succeed: in containers weakened on purpose, or against a harness of the usual naive kind.
Each control must be noticed, or the suite fails.

| what is weakened | what was noticed |
| --- | --- |
{controls}
{missing}"""


def environment(command: str) -> dict[str, Any]:
  """What a figure needs beside it."""
  here = pathlib.Path(__file__).parent
  git = subprocess.run(
    ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here
  )
  return {
    "command": command,
    "commit": git.stdout.strip() or "unknown",
    "device": f"{os.cpu_count()} CPU cores ({platform.machine()}), Linux {platform.release()}",
    "date": datetime.date.today().isoformat(),
  }


def write(results: dict[str, Any], workdir: pathlib.Path) -> None:
  """Writes isolation.md and isolation/results.json."""
  (workdir / "isolation").mkdir(parents=True, exist_ok=True)
  text = json.dumps(results, indent=1, ensure_ascii=True)
  (workdir / "isolation" / "results.json").write_text(text + "\n")
  (workdir / "isolation.md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
  outcomes, neighbours = results["outcomes"], results["neighbours"]
  rows = []
  for one in outcomes:
    cells = (one["category"], one["name"], one["language"], one["user"],
             "contained" if one["verdict"] == "contained" else "**BREACH**", one["reason"])  # fmt: skip
    rows.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
  bad = [one for one in outcomes if one["verdict"] != "contained"]
  findings = ["", "## Breaches", ""] if bad else []
  for one in bad:
    findings.append(
      f"- {_cell(one['name'])}, as {one['user']}: {_cell('; '.join(one['evidence']))}"
    )
  missing = results["missing"]
  languages = sorted({one["language"] for one in outcomes} - {"host"})
  return _TEXT.format(
    **results["environment"],
    attacks=len({(one["category"], one["name"], one["language"]) for one in outcomes}),
    plays=len(outcomes), languages=", ".join(languages), neighbours=neighbours["count"],
    breaches=len(bad), lost=results["replaced"], jobs=neighbours["jobs"],
    wrong=len(neighbours["errors"]), p50=neighbours["job_p50_s"] * 1e3, max=neighbours["job_max_s"],
    quiet=neighbours["quiet_p50_s"] * 1e3, bound=neighbours["bound_s"],
    rows="\n".join(rows), findings="\n".join([*findings, ""]),
    controls="\n".join(f"| {_cell(c['name'])} | {_cell(c['noticed'])} |" for c in results["controls"]),
    missing=f"\nNot played, for want of the language in the image: {', '.join(missing)}.\n" if missing else "",
  )  # fmt: skip


def _cell(text: str) -> str:
  """Text that cannot break out of a table, whatever an attacker wrote."""
  plain = "".join(character if character.isprintable() else "?" for character in text)
  for character in "|`<>":
    plain = plain.replace(character, {"|": "/", "`": "'", "<": "(", ">": ")"}[character])
  return plain[:300]
