"""Classes of image files by a trained network: ``python -m distcv.predict RUN image.png …``."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from distcv.command import printable, run_command
from distcv.command_line import parse_arguments, write_file
from distcv.config import InputError, Strict
from distcv.environment import set_thread_environment

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from distcv.data import Shape
    from distcv.trained import TrainedNetwork

BATCH = 256
MAX_PIXELS = 1 << 26  # of an image; decoding so many takes less than 1 GiB
# What Pillow decodes by itself; it would hand an EPS file to Ghostscript, which runs what it says.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


class Arguments(Strict):
    """Which network, and which images."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = Field(
        description="Run folder of the network."
    )
    images: tyro.conf.Positional[tuple[Path, ...]] = Field(
        description="Image files, and folders, whose images are taken at any depth, sorted by path."
    )
    top: int = Field(3, ge=1, description="Classes to show of each image, the likeliest first.")
    invert: bool = Field(
        False, description="Swap black and white: for ink on paper, where the data is the reverse."
    )
    which: Literal["last", "best"] = Field(
        "last", description="Checkpoint: the last one, or the one of the best test accuracy."
    )
    device: str = Field("cpu", description="Where to compute, such as cpu or cuda.")
    json_file: Annotated[Path | None, tyro.conf.arg(name="json", metavar="FILE")] = Field(
        None, description="Write paths, classes and probabilities to this file, too."
    )


def main() -> int:
    """Print a line for each image; 2 if one couldn't be read."""
    arguments = parse_arguments(
        Arguments,
        prog="distcv.predict",
        description="Classes of images with their probabilities. An image of any size is turned "
        "upright, laid on white where it is transparent, made gray or RGB as the data set is, and "
        "stretched to its size.",
    )
    if not arguments.images:
        raise InputError("no images: name files or folders after the run's folder")
    paths, unread = find_images(arguments.images)

    set_thread_environment()
    import torch

    from distcv.trained import open_run

    try:
        torch.zeros(1, device=arguments.device).item()  # of `meta` there are no values
    except (RuntimeError, AssertionError, ImportError) as error:
        problem = str(error).splitlines()[0]
        raise InputError(f"--device {arguments.device}: {problem}: choose another") from None
    trained = open_run(arguments.run, which=arguments.which, device=arguments.device)
    rows: list[dict[str, Any]] = []
    bright = 0
    for start in range(0, len(paths), BATCH):
        read = []
        for path in paths[start : start + BATCH]:
            try:
                pixels = read_image(path, trained.info.shape)
            except Exception as error:  # decoders of damaged files raise almost anything
                unread.append(f"{path}: {' '.join(str(error).split()) or type(error).__name__}")
                continue
            bright += has_bright_border(pixels)
            read.append((path, 255 - pixels if arguments.invert else pixels))
        for row in predict(trained, read, arguments.top):
            rows.append(row)
            likeliest = (f"{p['class']} {100 * p['probability']:.1f} %" for p in row["classes"])
            print(printable("  ".join([row["path"], *likeliest])))
    if bright and trained.info.format == "idx" and not arguments.invert:
        print(
            f"hint: {bright} of {len(rows)} images are brighter at the border than in the middle; "
            f"{trained.info.name} is white on black: try --invert"
        )
    for line in unread:
        print(printable(f"skipped {line}"), file=sys.stderr)
    if file := arguments.json_file:
        write_file("--json", file, lambda: file.write_text(json.dumps(rows, indent=1) + "\n"))
    return 2 if unread else 0


def find_images(places: tuple[Path, ...]) -> tuple[list[Path], list[str]]:
    """The files named, with those in the folders named, and a line for each folder without any.

    Files in folders count as images by their suffix; hidden ones don't.
    """
    from PIL import Image

    suffixes = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    paths, problems = [], []
    for place in places:
        if not place.is_dir():
            paths.append(place)
            continue
        inside = sorted(
            path
            for path in place.rglob("*")
            if path.suffix.lower() in suffixes
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(place).parts)
        )
        paths += inside
        if not inside:
            problems.append(f"{place}: no images in this folder")
    return paths, problems


def read_image(path: Path, shape: Shape) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image file, or its first frame, as uint8 pixels of this (C, H, W).

    One of the same size and channels comes as it is. Nothing is decoded that has more pixels than
    MAX_PIXELS.

    Raises:
        Exception: of any kind, by the decoder: missing, not an image, damaged.
    """
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    if path.exists() and not path.is_file():  # what isn't could be waited for without end
        raise ValueError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
        file = Image.open(path, formats=FORMATS)
    with file:
        image: Image.Image = file
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} are more than {MAX_PIXELS:,} pixels")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range: save it as PNG")
        if image.mode.startswith("I"):  # 16 bits; older versions of Pillow say 32
            values = np.asarray(image).astype(np.uint32).clip(0, 65535)
            byte = image.mode == "I" and int(values.max()) < 256  # 32 bits that hold 8
            image = Image.fromarray((values if byte else values >> 8).astype(np.uint8))
        elif image.has_transparency_data:
            image = _on_white(image)
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            # Pillow's filter widens as it shrinks, which is what keeps thin lines from vanishing.
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(image, dtype=np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _on_white(image: Image) -> Image:
    from PIL import Image

    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def has_bright_border(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bool:
    """Whether the outermost pixels are brighter on average than the middle half of (C, H, W)."""
    height, width = pixels.shape[1:]
    border = [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]]
    middle = pixels[:, height // 4 : -(height // 4), width // 4 : -(width // 4)]
    return bool(sum(map(float, (edge.mean() for edge in border))) / 4 > middle.mean())


def predict(
    trained: TrainedNetwork,
    images: list[tuple[Path, np.ndarray[Any, np.dtype[np.uint8]]]],
    top: int,
) -> list[dict[str, Any]]:
    """For each of these images (C, H, W): its path, and its likeliest classes as
    ``{"class": name, "probability": 0..1}``."""
    import numpy as np
    import torch

    if not images:
        return []
    with torch.inference_mode():
        batch = torch.from_numpy(np.stack([pixels for _, pixels in images]))
        top = min(top, len(trained.info.classes))
        found = trained.logits(batch).softmax(1).topk(top)
    names = trained.info.classes
    return [
        {
            "path": str(path),
            "classes": [
                {"class": names[label], "probability": share}
                for label, share in zip(labels, shares, strict=True)
            ],
        }
        for (path, _), labels, shares in zip(
            images, found.indices.tolist(), found.values.tolist(), strict=True
        )
    ]


def command() -> None:
    """Entry point: :func:`main`, and its exit code."""
    run_command(main)


if __name__ == "__main__":
    command()
