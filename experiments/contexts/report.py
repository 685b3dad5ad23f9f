"""The table and the plot of `experiments.context`."""

import pathlib
import statistics
from collections.abc import Callable, Sequence

from experiments.ablations.figures import markdown
from experiments.contexts.families import FAMILIES
from experiments.contexts.play import SCALES, TECHNIQUES, TURNS, Result, arms
from rome.evals.metrics import wilson_interval


def rate(results: Sequence[Result]) -> str:
  """Share that was solved, with its 95 % interval."""
  n = len(results)
  solved = sum(r.solved for r in results)
  low, high = wilson_interval(solved, n)
  return f"{solved}/{n} = {solved / n:.2f} [{low:.2f}, {high:.2f}]"


def _share(results: Sequence[Result]) -> str:
  return f"{sum(r.solved for r in results)}/{len(results)}"


def _mean(results: Sequence[Result], of: Callable[[Result], float]) -> str:
  return f"{statistics.fmean(map(of, results)):.1f}"


def tables(results: Sequence[Result], scale: str = "large") -> str:
  """All of it in Markdown."""
  families = [f for f in FAMILIES if any(r.family == f for r in results)]
  by_arm = {arm: [r for r in results if r.arm == arm] for arm in arms()}
  by_arm = {arm: some for arm, some in by_arm.items() if some}
  rows = []
  for arm, some in by_arm.items():
    shares = [_share([r for r in some if r.family == f]) for f in families]
    costs = [
      _mean(some, lambda r: r.turns),
      _mean(some, lambda r: r.rewrites),
      _mean(some, lambda r: r.read / 1000),
      _mean(some, lambda r: r.new / 1000),
      _mean(some, lambda r: r.sampled / 1000),
    ]
    rows.append([arm, *shares, rate(some), *costs])
  columns = ["techniques", *families, "solved [95 %]"]
  columns += ["turns", "rewrites", "read, k", "new, k", "sampled, k"]
  window, reply = SCALES[scale].window, SCALES[scale].reply
  text = f"Window {window} tokens, replies up to {reply}, {TURNS} turns at most.\n\n"
  text += markdown(columns, rows)
  return text + "\n" + _pairs(by_arm) + "\n" + _reasons(by_arm)


def _pairs(by_arm: dict[str, list[Result]]) -> str:
  """Each technique taken from all of them, episode by episode."""
  if "all" not in by_arm:
    return ""
  whole = {(r.family, r.seed): r.solved for r in by_arm["all"]}
  rows = []
  for name in TECHNIQUES:
    less = {(r.family, r.seed): r.solved for r in by_arm.get(f"all - {name}", ())}
    lost = [key for key in less if whole[key] and not less[key]]
    won = [key for key in less if not whole[key] and less[key]]
    where = ", ".join(f"{f} {sum(k[0] == f for k in lost)}" for f in FAMILIES if (f in dict(lost)))
    rows.append([name, str(len(lost)), str(len(won)), where or "-"])
  columns = ["without", "solved only with it", "only without it", "where it was needed"]
  return markdown(columns, rows)


def _reasons(by_arm: dict[str, list[Result]]) -> str:
  """How the episodes ended that were not solved."""
  rows = []
  for arm, some in by_arm.items():
    failed = [r.reason if r.reason != "answered" else "wrong answer" for r in some if not r.solved]
    counted = ", ".join(f"{reason} {failed.count(reason)}" for reason in sorted(set(failed)))
    rows.append([arm, counted or "-"])
  return markdown(["techniques", "episodes that were not solved"], rows)


def draw(path: pathlib.Path, results: Sequence[Result]) -> None:
  """Solved, with intervals, and tokens that had to be read anew, by arm."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  names = [arm for arm in arms() if any(r.arm == arm for r in results)]
  groups = [[r for r in results if r.arm == arm] for arm in names]
  solved = [statistics.fmean(r.solved for r in some) for some in groups]
  ends = [wilson_interval(sum(r.solved for r in some), len(some)) for some in groups]
  errors = [
    [s - low for s, (low, _) in zip(solved, ends, strict=True)],
    [high - s for s, (_, high) in zip(solved, ends, strict=True)],
  ]
  tokens = [statistics.fmean(r.new for r in some) / 1000 for some in groups]
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 0.28 * len(names) + 1.2), sharey=True)
  left.barh(names, solved, xerr=errors, color="C0", error_kw={"linewidth": 1})
  left.set_xlim(0, 1)
  left.set_xlabel("solved, 95 % interval")
  right.barh(names, tokens, color="C1")
  right.set_xlabel("thousand tokens read anew in an episode")
  left.invert_yaxis()
  figure.tight_layout()
  figure.savefig(path, dpi=110, metadata={"Software": None})
  pyplot.close(figure)
