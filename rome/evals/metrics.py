"""Success rates with intervals.

Left out: pass@k and averages over repeated runs, until a suite reports them.
"""

import math

# Two-sided 95 % quantile of the standard normal distribution.
Z_95 = 1.959963984540054


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
  """Wilson score interval of a binomial proportion.

  Choice: Wilson rather than the normal approximation, because success rates here sit near 0 and 1,
  where the latter leaves [0, 1] or collapses to a point.

  Args:
    successes: trials that succeeded, 0..n.
    n: independent trials, at least 1.
    z: standard normal quantile; the default gives 95 %.

  Returns:
    (low, high), with 0 <= low <= successes / n <= high <= 1.

  Raises:
    ValueError: n < 1, or successes outside 0..n.

  Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209-212.
  """
  if n < 1 or not 0 <= successes <= n:
    raise ValueError(f"wilson_interval: 0 <= successes <= n and n >= 1, not {successes} of {n}")
  rate = successes / n
  scale = 1 + z * z / n
  centre = (rate + z * z / (2 * n)) / scale
  half = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
  # The exact ends; rounding would leave them a few ulps inside.
  low = 0.0 if successes == 0 else centre - half
  high = 1.0 if successes == n else centre + half
  return low, high
