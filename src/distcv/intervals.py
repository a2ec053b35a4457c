"""Confidence intervals of means and of differences of means, by Student's t distribution.

They suppose values that are nearly normal, as the test accuracies of a recipe's seeds are.
"""

import math
import statistics
from collections.abc import Sequence

Interval = tuple[float, float, float]
"""Estimate, lower end, upper end."""


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean, and the interval that covers the true one in that share of samples.

    Raises:
        ValueError: fewer than two values, which have no deviation.
    """
    return _interval(statistics.mean(values), _error(values), len(values) - 1, confidence)


def difference_interval(
    a: Sequence[float], b: Sequence[float], paired: bool, confidence: float = 0.95
) -> Interval:
    """The mean of ``b`` less that of ``a``, and its interval.

    Args:
        a: values of one group.
        b: values of the other.
        paired: ``a[i]`` and ``b[i]`` belong together, as runs of one seed do; the interval is that
            of their differences. Else it is Welch's, for groups of unequal size and variance (B. L.
            Welch, "The generalization of Student's problem", Biometrika 34, 1947).
        confidence: share of samples whose interval covers the true difference.

    Raises:
        ValueError: fewer than two values in a group, or pairs without a partner.
    """
    if paired:
        return mean_interval([y - x for x, y in zip(a, b, strict=True)], confidence)
    parts = _error(a) ** 2, _error(b) ** 2
    error = math.sqrt(sum(parts))
    # Welch and Satterthwaite; each part's share of the variance, so that no power under- or
    # overflows. Where nothing varies, any number of degrees of freedom does.
    shares = [part / sum(parts) for part in parts] if error else [1.0, 0.0]
    freedom = 1 / sum(s**2 / (len(v) - 1) for s, v in zip(shares, (a, b), strict=True))
    return _interval(statistics.mean(b) - statistics.mean(a), error, freedom, confidence)


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


def _interval(estimate: float, error: float, freedom: float, confidence: float) -> Interval:
    from scipy.special import stdtrit  # 0.3 s to import, scipy.stats 0.8 s

    half = float(stdtrit(freedom, (1 + confidence) / 2)) * error
    return estimate, estimate - half, estimate + half
