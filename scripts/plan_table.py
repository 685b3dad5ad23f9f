"""Writes docs/results/plan.md: which TPU slices train Qwen3-30B-A3B, and how fast at best.

  python scripts/plan_table.py            plans what docs/results/plan/plans.jsonl lacks
  python scripts/plan_table.py --again    plans everything

Needs libtpu (pip install "rome[tpu]") and no TPU; a plan takes a minute or two of two CPU cores.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLANS = ROOT / "docs" / "results" / "plan" / "plans.jsonl"
PAGE = ROOT / "docs" / "results" / "plan.md"

# Topology, rows, tokens a row, mesh; an empty mesh is the default.
ROWS = [
  ("v5p:4x4x4", 64, 32_768, ""),
  ("v6e:8x8", 64, 32_768, ""),
  ("v5p:2x2x1", 4, 32_768, ""),
  ("v6e:4x4", 16, 32_768, ""),
  ("v5p:2x2x2", 8, 32_768, ""),
  ("v5e:16x16", 256, 8_192, ""),
  ("v5e:8x8", 64, 8_192, ""),
  ("v5e:16x16", 128, 32_768, "fsdp=128,context=2"),
  ("v5p:4x4x4", 64, 65_536, ""),
  ("v5p:4x4x4", 16, 131_072, "fsdp=16,context=4"),
  ("v6e:8x8", 32, 65_536, "fsdp=32,context=2"),
  ("v6e:16x16", 256, 32_768, ""),
]

HEAD = """# Qwen3-30B-A3B on TPU slices: what fits, and a bound on its speed

`python scripts/plan_table.py`, commit {commit}, {date}, jax {jax}, libtpu {libtpu}. Each line is a
step of a `rome plan`: the update (gradient of the IPA loss, clipping, AdamW; float32 weights and
moments, bfloat16 compute, layers recomputed in the backward pass) or one token of generation in
each row of a full cache, compiled ahead of time by libtpu on a machine without a TPU.

**Nothing was run on a TPU.** Whether a program fits is the compiler's word; the memory shown is the
sum of all it sets aside, some of which it may lay over each other, so a step can fit with a sum a
little above the limit. Seconds are a roofline
off the data sheet: the slowest of computing, memory and network, each at full rate and all at once;
a real step is slower, and no kernel here has been tuned on a TPU. Tokens a second and MFU are upper
bounds for the same reason.

"""
COLUMNS = [
  "slice",
  "mesh",
  "rows × tokens",
  "step",
  "memory a device",
  "fits",
  "compute, memory, network",
  "tokens/s at most",
  "MFU at most",
  "compiled in",
]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--again", action="store_true", help="plan everything again")
  again = parser.parse_args().again
  PLANS.parent.mkdir(parents=True, exist_ok=True)
  done = [] if again or not PLANS.exists() else [json.loads(x) for x in PLANS.open()]
  for row in ROWS:
    if not any(tuple(plan["asked"]) == row for plan in done):
      done.append(_plan(*row))
      done.sort(key=lambda plan: ROWS.index(tuple(plan["asked"])))
      # After each, as the table takes half an hour and may be interrupted.
      PLANS.write_text("".join(json.dumps(plan) + "\n" for plan in done))
      _write(done)
  _write(done)


def _write(done: list[dict]) -> None:
  last = max(done, key=lambda plan: plan["date"])
  lines = [line for plan in done for line in _lines(plan)]
  head = HEAD.format(commit=last["commit"], date=last["date"], **last["versions"])
  table = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
  PAGE.write_text(head + "".join(table + lines))


def _plan(topology: str, batch: int, length: int, mesh: str) -> dict:
  command = [sys.executable, "-m", "rome.cli", "plan", "--preset=qwen3_30b_a3b", "--json"]
  command += [f"--topology={topology}", f"--batch={batch}", f"--length={length}", f"--mesh={mesh}"]
  out = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
  git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
  commit = subprocess.run(git, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
  where = {"asked": (topology, batch, length, mesh), "commit": commit}
  return where | {"date": datetime.date.today().isoformat()} | json.loads(out)


def _lines(plan: dict) -> list[str]:
  mesh = " ".join(f"{k}={v}" for k, v in plan["mesh"].items())
  lines = []
  for name, step in plan["steps"].items():
    memory, roofline = step["memory"], step.get("roofline")
    cells = [plan["topology"], mesh, f"{plan['batch']} × {plan['length']:,}", name]
    cells.append(f"{memory['peak'] / 2**30:.1f} of {memory['limit'] / 2**30:.1f} GiB")
    cells.append("yes" if step["fits"] else "no")
    if roofline:
      times = ", ".join(
        f"**{v:.3g} s**" if k == roofline["bound"] else f"{v:.3g}"
        for k, v in roofline["seconds"].items()
      )
      cells += [times, f"{roofline['tokens_per_second']:,.0f}", f"{roofline['mfu']:.1%}"]
    else:
      cells += ["", "", ""]
    cells.append(f"{step['compile_seconds']:.0f} s")
    lines.append(_row(cells))
  return lines


def _row(cells: list[str]) -> str:
  return "| " + " | ".join(cells) + " |\n"


if __name__ == "__main__":
  main()
