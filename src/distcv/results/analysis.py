"""Target, result and analysis of a network in words, as the source documents have them.

The phrases are chosen by rules, and each holds the figures that it was chosen by.
"""

import statistics
from collections.abc import Sequence

from distcv.config import Recipe
from distcv.intervals import difference_interval
from distcv.results import spread
from distcv.results.documents import Aim, Document
from distcv.results.files import Measured

OVERFITS = 0.1  # points of accuracy that train has above test
RISES = 1.05  # test loss at the end, over its lowest
HARDER = {  # what makes training images harder than those of the test set
    "dropout": "dropout", "translate": "shifts", "rotate": "rotations", "scale": "zoom",
    "shear": "shears", "flip": "mirroring", "cutout": "cutout", "mixup": "mixup",
    "cutmix": "cutmix", "trivial_augment": "TrivialAugment",
}  # fmt: skip
NOT_YET = "not measured yet"


def fit(gap: float) -> str:
    """Over- or underfitting, by the train accuracy less the test accuracy in points."""
    if gap > OVERFITS:
        return f"overfits: train is {gap:.2f} points above test"
    side = "below" if gap < 0 else "above"
    return f"no overfitting: train is {abs(gap):.2f} points {side} test"


def behind(lost: float) -> str:
    """How the last epoch stands to the best one, by the accuracy in points that it lacks."""
    if lost <= 0:
        return "no epoch is better than the last"
    digits = 2 if lost >= 0.005 else 3
    return f"the last epoch is {lost:.{digits}f} points below the best"


def target(said: Document) -> str:
    """Our aims beside the document's."""
    aim = said.aim
    runs = f"the mean of {aim.runs} seeds" if aim.runs > 1 else "one run"
    conditions = [a.condition for a in (aim, *said.further_aims.values()) if a.condition]
    condition = f", {'; '.join(conditions)}" if conditions else ""
    theirs = f"; the document: {said.target}" if said.target else ""
    return f"{aim.accuracy:.2f} % at the last epoch, {runs}{condition}{theirs}."


def result(measured: Measured, said: Document, aim: Aim | None = None) -> str:
    """The mean over the seeds, beside the document's best epoch, and whether it reaches the aim."""
    values = measured.accuracies
    if not values:
        return NOT_YET
    best = spread([r["best_test_accuracy"] for r in measured.results])
    words = [f"{spread(values)} % (n = {len(values)}; at the best epochs {best})"]
    if said.test_accuracy is not None:
        gain = statistics.mean(values) - said.test_accuracy
        words.append(f"{_points(gain)} the document's best epoch")
    if aim is not None:
        words.append(verdict(statistics.mean(values), len(values), aim))
    return ", ".join(words)


def verdict(mean: float, runs: int, aim: Aim) -> str:
    """Whether an aim is reached, by the mean as it is: 99.396 prints as 99.40 and misses 99.40."""
    if mean < aim.accuracy - 1e-9:  # a mean of percentages is off by rounding
        return f"aim missed by {aim.accuracy - mean:.3f} points"
    return "aim reached" if runs >= aim.runs else f"aim reached by {runs} of {aim.runs} runs"


def analysis(measured: Measured) -> str:
    """What the curves of a recipe's runs say."""
    if not measured.results:
        return NOT_YET
    curves = [measured.curves[r["seed"]] for r in measured.results if r["seed"] in measured.curves]
    if not curves:
        return "the curves of these runs were not kept"
    return "; ".join(
        [_train_and_test(curves, measured.recipe), _loss(curves, measured.recipe), _best(curves)]
    )


Curves = Sequence[Sequence[dict[str, float]]]


def _train_and_test(curves: Curves, recipe: Recipe) -> str:
    last = [rows[-1] for rows in curves]
    train, test = (statistics.mean(row[f"{p}_accuracy"] for row in last) for p in ("train", "test"))
    words = f"{fit(train - test)} ({train:.2f} and {test:.2f} %)"
    plain = Recipe()
    harder = [word for k, word in HARDER.items() if getattr(recipe, k) != getattr(plain, k)]
    how = [f"on images made harder by {' and '.join(harder)}"] if harder else []
    if recipe.ema_decay is not None:
        how.append("with the weights before their averaging")
    if train >= test or not how:
        return words
    return f"{words}, being measured {' and '.join(how)}"


def _loss(curves: Curves, recipe: Recipe) -> str:
    end = statistics.mean(rows[-1]["test_loss"] for rows in curves)
    if recipe.label_smoothing:  # which teaches doubt, and that grows as the network learns
        return f"test loss ends at {end:.4f}, which label smoothing keeps up"
    lowest = [min(rows, key=lambda row: row["test_loss"]) for rows in curves]
    low = statistics.mean(row["test_loss"] for row in lowest)
    if end > RISES * low:
        return f"test loss rises from {low:.4f} ({_epochs(lowest)}) to {end:.4f}"
    return f"test loss ends at {end:.4f}, its lowest is {low:.4f} ({_epochs(lowest)})"


def _best(curves: Curves) -> str:
    best = [max(rows, key=lambda row: row["test_accuracy"]) for rows in curves]
    last = [rows[-1] for rows in curves]
    lost = statistics.mean(
        b["test_accuracy"] - row["test_accuracy"] for b, row in zip(best, last, strict=True)
    )
    return behind(lost) + (f" ({_epochs(best)})" if lost > 0 else "")


def _epochs(rows: Sequence[dict[str, float]]) -> str:
    """As `epoch 4` or `epochs 11 to 17`."""
    numbers = sorted({row["epoch"] for row in rows})
    if len(numbers) == 1:
        return f"epoch {numbers[0]:g}"
    return f"epochs {numbers[0]:g} to {numbers[-1]:g}"


def what_helped(ours: Measured, theirs: Measured) -> str:
    """How the accuracies differ from those of the document's recipe, and what sets it apart.

    Nothing as long as one of them is not measured.
    """
    sides = theirs.accuracies, ours.accuracies
    if not all(sides):
        return ""
    gain, interval = statistics.mean(sides[1]) - statistics.mean(sides[0]), ""
    if min(map(len, sides)) > 1:
        _, low, high = difference_interval(*sides, paired=False)
        interval = f" (95 % interval of the difference {low:+.2f} to {high:+.2f})"
    changes = _changes(theirs.recipe, ours.recipe)
    return f"{_points(gain)} the document's recipe{interval}, with {changes}"


def _changes(before: Recipe, after: Recipe) -> str:
    old, new = before.model_dump(exclude={"seed"}), after.model_dump(exclude={"seed"})
    return ", ".join(f"{k} {old[k]} → {new[k]}" for k in old if old[k] != new[k])


def _points(gain: float) -> str:
    """As `0.12 points above`."""
    return f"{abs(gain):.2f} points {'below' if round(gain, 2) < 0 else 'above'}"
