"""What the source documents say of the networks: ``results/documents.yaml``."""

from pathlib import Path

import yaml
from pydantic import Field, TypeAdapter

from distcv.config import InputError, Strict, validated


class Aim(Strict):
    """What our own recipe is to reach."""

    accuracy: float
    """Mean test accuracy in percent at the last epoch."""
    runs: int = Field(ge=1)
    """Over so many seeds."""
    condition: str = ""


class Document(Strict):
    """A network's section in a source document, and our aim; None and "" where nothing is said."""

    document: str
    """Its number."""
    title: str
    parameters: int | None = None
    epochs: int | None = None
    train_accuracy: float | None = None
    test_accuracy: float | None = None
    """In percent, at the best epoch of one run; train accuracy at its own best."""
    printed: float | None = None
    """What is printed for the test accuracy, where that is a misprint."""
    seconds: float | None = None
    hardware: str = ""
    target: str = ""
    result: str = ""
    analysis: str = ""
    note: str = ""
    """What is to be known of the figures."""
    aim: Aim
    further_aims: dict[str, Aim] = Field(default_factory=dict)
    """Those of our other recipes for the network, by their names."""


def read_documents(clone: Path) -> dict[str, Document]:
    """The sections, by the name of the recipe that is ours.

    Raises:
        InputError: the file is missing or wrong.
    """
    path = clone / "results/documents.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}: do this in a clone of distcv") from None
    table = TypeAdapter(dict[str, Document])
    return validated(lambda: table.validate_python(found), where=f"{path}: ")
