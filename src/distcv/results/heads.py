"""The heads of recipes: what was measured with them, in lines of comment behind the command."""

from distcv.config import InputError
from distcv.results import spread
from distcv.results.analysis import NOT_YET
from distcv.results.documents import Document
from distcv.results.files import Measured

GENERATED = tuple(f"# {name}:" for name in ("Document", "Accuracy", "Time", "Results"))


def with_head(text: str, measured: Measured, said: Document | None) -> str:
    """The text of a recipe with those lines anew; ``said`` is its document if it follows one.

    Raises:
        InputError: it has no line for them to stand behind.
    """
    lines = text.splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    kept, generated = [], False
    for line in lines[:end]:
        goes_on = generated and line.startswith("#    ")
        generated = goes_on or line.startswith(GENERATED)
        if not generated:
            kept.append(line)
    commands = [i for i, line in enumerate(kept, start=1) if line.startswith("# Command: ")]
    if not commands:
        name = measured.name
        raise InputError(
            f"configs/{name}.yaml: no line that tells its command: put '# Command:  "
            f"python -m distcv.train --recipe {name}' into the comment at its top"
        )
    after = commands[0]
    new = [*kept[:after], *head_lines(measured, said), *kept[after:], *lines[end:]]
    return "\n".join(new) + "\n"


def head_lines(measured: Measured, said: Document | None) -> list[str]:
    """The generated lines."""
    lines = []
    if said is not None:
        best = (
            f"best test accuracy {said.test_accuracy:.2f} %"
            if said.test_accuracy
            else "no accuracy"
        )
        epochs = f" in {said.epochs} epochs" if said.epochs else ""
        lines.append(f"# Document: {best}{epochs}.")
    if not measured.results:
        return [*lines, f"# Accuracy: {NOT_YET}."]
    n = len(measured.results)
    torch = sorted({r["environment"]["versions"]["torch"] for r in measured.results})
    return [
        *lines,
        f"# Accuracy: {spread(measured.accuracies)} %, n = {n} seed{'s' * (n > 1)}, last epoch, "
        "no test-time augmentation.",
        f"# Time:     {measured.time} of training and evaluation on {measured.hardware}, "
        f"{measured.recipe.precision}, torch {' and '.join(torch)}{measured.with_flags}.",
        f"# Results:  results/{measured.name}.json",
    ]
