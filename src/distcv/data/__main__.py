"""Fetch a data set and look at it: ``python -m distcv.data --dataset mnist --show samples.png``."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from distcv.command import run_command
from distcv.command_line import parse_arguments
from distcv.config import InputError, Recipe, Strict, load_recipe
from distcv.data import find_dataset, load_dataset
from distcv.environment import set_thread_environment

if TYPE_CHECKING:
    from distcv.data import ImageData


class Arguments(Strict):
    """The flags of ``distcv.data``."""

    dataset: str = Field("mnist", description="The data set, by its name.")
    data_dir: Path = Field(Path("data"), description="Folder in which data sets are kept.")
    show: Path | None = Field(
        None, description="Write samples to this PNG: one of each class raw, below it augmented."
    )
    recipe: str | None = Field(
        None,
        description="Recipe whose augmentation is shown; default: gap for gray images, else "
        "resnet18.",
    )
    rows: int = Field(4, ge=1, le=100, description="Augmented versions of each sample.")


def main() -> None:
    """Load the set, say what it holds, and draw samples if asked to."""
    arguments = parse_arguments(
        Arguments, prog="distcv.data", description="Fetch a data set, verify it, and look at it."
    )
    name = arguments.dataset
    gray = find_dataset(name).shape[0] == 1
    recipe_name = arguments.recipe or ("gap" if gray else "resnet18")
    recipe = load_recipe(recipe_name)
    set_thread_environment()
    data = load_dataset(name, arguments.data_dir)
    channels, height, width = data.train_images.shape[1:]
    print(
        f"{name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test images, "
        f"{channels}x{height}x{width}, classes: {', '.join(data.info.classes)}"
    )
    if arguments.show:
        _write_picture(arguments.show, data, recipe, arguments.rows)
        print(f"samples as recipe {recipe_name} augments them: {arguments.show}")


def _write_picture(path: Path, data: "ImageData", recipe: Recipe, rows: int) -> None:
    from PIL import Image

    from distcv.samples import sample_picture

    if path.suffix.lower() != ".png":
        raise InputError(f"--show {path}: give the name of a .png file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample_picture(data, recipe, rows).permute(1, 2, 0).numpy()).save(path)
    except OSError as error:
        raise InputError(f"--show {path}: {error.strerror}: give the name of a .png file") from None


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
