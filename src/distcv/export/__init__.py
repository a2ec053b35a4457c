"""A trained network as a file that other programs run: ``python -m distcv.export RUN --to onnx``.

The file is read back and run on test images; it is kept only if its logits are the network's.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from distcv.command import run_command
from distcv.command_line import parse_arguments
from distcv.config import InputError, Strict
from distcv.environment import set_thread_environment

SAMPLES = 100  # test images on which the file is checked, one at a time and all together
CARD = "README.md"
FILES = {"onnx": "model.onnx", "torch-export": "model.pt2", "safetensors": "model.safetensors"}


class Arguments(Strict):
    """What to export, and where to."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = Field(
        description="Run folder of the network."
    )
    to: Literal["onnx", "torch-export", "safetensors"] = Field(
        description="onnx and torch-export: a program from raw images to logits; safetensors: the "
        "weights by name."
    )
    output: Path | None = Field(
        None, description="Folder for the file and its model card. Default: RUN/export/FORMAT."
    )
    which: Literal["last", "best"] = Field(
        "last", description="Checkpoint: the last one, or the one of the best test accuracy."
    )
    data_dir: Path = Field(Path("data"), description="Folder in which data sets are kept.")


def main() -> None:
    """Write the file, check it, and put it and its card into their folder."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.export",
        description="Write a trained network for other programs, checked on test images, with a "
        "model card beside it.",
    )
    name = FILES[arguments.to]
    folder = arguments.output or arguments.run / "export" / arguments.to
    if arguments.to == "onnx":
        _require("onnx", "onnxscript", "onnxruntime")
    _check_place(folder, name)
    set_thread_environment()

    from distcv.export.card import model_card
    from distcv.export.formats import MAKE, READ, check, properties
    from distcv.trained import open_run
    from distcv.training import load_data

    trained = open_run(arguments.run, which=arguments.which)
    images = load_data(trained.recipe, arguments.data_dir, print).test_images[:SAMPLES]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            file = Path(scratch) / name
            file.write_bytes(MAKE[arguments.to](trained, properties(trained)))
            checked = check(trained, READ[arguments.to](file, trained), images)
            card = model_card(trained, arguments.to, arguments.which, file, checked)
            (file.parent / CARD).write_text(card, encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for made in (name, CARD):
                (file.parent / made).replace(folder / made)
    except OSError as error:
        where = error.filename or folder
        raise InputError(f"{where}: {error.strerror}: choose another --output") from None
    size = (folder / name).stat().st_size
    print(f"{folder / name}: {size / 2**20:.2f} MiB, step {trained.step}; {checked.describe()}")
    print(f"{folder / CARD}: its model card")


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--to onnx needs {', '.join(missing)}: pip install 'distcv[export]'")


def _check_place(folder: Path, name: str) -> None:
    """Raise InputError if the folder holds anything but an earlier export, which is replaced."""
    try:
        present = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: choose another --output") from None
    if present and not {name} <= present <= {name, CARD}:
        raise InputError(f"{folder} holds other files: choose a new or empty folder by --output")


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)
