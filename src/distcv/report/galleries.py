"""Test images: the worst mistakes, and where the network looks."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distcv.config import InputError
from distcv.report.charts import TEXT, WIDTH, png_of, reduced
from distcv.report.page import Block, Gallery, Picture, Text
from distcv.report.records import Group, Record

if TYPE_CHECKING:
    from torch import Tensor

    from distcv.data import ImageData

MOST_MISTAKES, MOST_HEAT_MAPS, COLUMNS = 16, 8, 4
SEARCHED = 256  # test images among which Grad-CAM's right ones are found
ZOOM = 4  # pixels of an overlaid heat map for each of the image


class Images:
    """Test sets by recipe, each loaded once; why not, where one can't be had."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.held: dict[tuple[str, str], ImageData | str] = {}

    def of(self, record: Record) -> "ImageData | str":
        """The data set of a run, or the reason why there is none."""
        recipe = record.run.recipe
        key = (recipe.dataset, recipe.model if recipe.dataset == "synthetic" else "")
        if key not in self.held:
            from distcv.training import load_data

            try:
                self.held[key] = load_data(recipe, self.data_dir, print)
            except InputError:
                self.held[key] = (
                    f"The test images of {recipe.dataset} could not be had, so none are shown: "
                    "give --data-dir."
                )
        return self.held[key]


def worst_mistakes(group: Group, name: str, images: Images) -> Block:
    """The most confident mistakes of the group's first run that lists its mistakes."""
    listed = [record for record in group.finished if record.result.get("mistakes") is not None]
    if not listed:
        return Text(f"{group.label}: no finished run lists its mistakes; newer versions do.")
    record = listed[0]
    if not record.result["mistakes"]:
        return Text(f"{record.name}: not one mistake.")
    data = images.of(record)
    if isinstance(data, str):
        return Text(data)
    mistakes = _mistakes(record, data)
    if not mistakes:
        return Text(f"{record.name}: no mistake in a test image of {record.run.recipe.dataset}.")
    classes = data.info.classes
    pictures, sheet = [], []
    for mistake in mistakes:
        label, guess = classes[mistake["label"]], classes[mistake["predicted"]]
        lines = [f"{label} → {guess}", f"{100 * mistake['confidence']:.1f} %"]
        if shared := _shared(mistake["sample"], listed):
            lines.append(shared)
        pixels = pixels_of(data.test_images[mistake["sample"]])
        alt = f"Test image {mistake['sample']}: label {label}, predicted {guess}"
        pictures.append(Picture(alt, lines, encoded(pixels)))
        sheet.append((pixels, lines))
    caption = (
        f"{group.label}, run {record.name}: label → prediction and the confidence in it, the most "
        f"confident {len(mistakes)} mistakes."
    )
    if len(listed) > 1:
        caption += " Below, in how many of the runs the image is among the mistakes listed."
    alt = f"Worst mistakes of {record.name}: " + "; ".join(
        f"{picture.lines[0]} ({picture.lines[1]})" for picture in pictures
    )
    return Gallery(name, caption, alt, pictures, contact_sheet(sheet))


def _mistakes(record: Record, data: "ImageData") -> list[dict[str, Any]]:
    """The most confident mistakes of a result, of those in images and classes that there are."""
    images, classes = len(data.test_labels), len(data.info.classes)
    return [
        one for one in record.result.get("mistakes", [])
        if one["sample"] < images and max(one["label"], one["predicted"]) < classes
    ][:MOST_MISTAKES]  # fmt: skip


def _shared(sample: int, listed: Sequence[Record]) -> str:
    """In how many runs, of several, the mistake is listed."""
    if len(listed) < 2:
        return ""
    count = sum(any(m["sample"] == sample for m in r.result["mistakes"]) for r in listed)
    return f"{count} of {len(listed)} runs"


def heat_maps(group: Group, name: str, images: Images) -> list[Block]:
    """Grad-CAM of a few test images: some that are predicted right, some that are not."""
    from distcv.trained import open_run

    problem = f"{group.label}: no run has begun."
    for record in group.shown or group.records:
        try:
            network = open_run(record.run.folder)
        except OSError:  # of a run under way, which has just replaced it
            problem = f"{record.name}: its checkpoint is gone."
            continue
        except InputError as error:
            problem = f"{record.name}: {str(error).replace(str(record.run.folder), record.name)}."
            continue
        data = images.of(record)
        if isinstance(data, str):
            return [Text(data)]
        from distcv.report.gradcam import grad_cam

        right, wrong = _samples(record, data, network.logits)
        blocks: list[Block] = []
        for words, ids in (("right", right), ("wrong", wrong)):
            if not ids:
                blocks.append(Text(f"{group.label}: none predicted {words} was found."))
                continue
            try:
                heat, logits = grad_cam(network.network, network.logits, data.test_images[ids])
            except ValueError as error:
                return [Text(f"{record.name}: {error}.")]
            shares, guesses = logits.softmax(dim=1).max(dim=1)
            pictures, sheet = [], []
            for place, sample in enumerate(ids):
                label = data.info.classes[int(data.test_labels[sample])]
                guess = data.info.classes[int(guesses[place])]
                said = guess if words == "right" else f"{label} → {guess}"
                lines = [said, f"{100 * float(shares[place]):.1f} %"]
                pixels = overlaid(data.test_images[sample], heat[place])
                alt = f"Heat map on test image {sample}: label {label}, predicted {guess}"
                pictures.append(Picture(alt, lines, reduced(encoded(pixels))))
                sheet.append((pixels, lines))
            caption = (
                f"{group.label}, run {record.name}, step {network.step}: predicted {words}. Bright "
                "is what speaks for the class predicted."
            )
            alt = f"Grad-CAM of {len(ids)} test images predicted {words} by {record.name}."
            full = f"{name}-{words}"
            blocks.append(Gallery(full, caption, alt, pictures, contact_sheet(sheet), crisp=False))
        return blocks
    return [Text(problem)]


def _samples(record: Record, data: "ImageData", logits_of: Any) -> tuple[list[int], list[int]]:
    """Numbers of test images: of each of the first classes one predicted right; wrong ones.

    The wrong ones are the most confident mistakes of the result; without it, those among the
    first images. Only such as this network, on this machine, still gets wrong.
    """
    import torch

    listed = [mistake["sample"] for mistake in _mistakes(record, data)]
    tried = list(dict.fromkeys([*listed, *range(min(SEARCHED, len(data.test_labels)))]))
    with torch.no_grad():
        guesses = logits_of(data.test_images[tried]).argmax(dim=1).cpu()
    hit = (guesses == data.test_labels[tried]).tolist()
    first: dict[int, int] = {}
    for sample, is_right in zip(tried, hit, strict=True):
        if is_right:
            first.setdefault(int(data.test_labels[sample]), sample)
    wrong = [sample for sample, is_right in zip(tried, hit, strict=True) if not is_right]
    return [first[k] for k in sorted(first)][:MOST_HEAT_MAPS], wrong[:MOST_HEAT_MAPS]


def pixels_of(image: "Tensor") -> Any:
    """An image (C, H, W) as an array (H, W) of grey or (H, W, 3) of colours."""
    return image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy()


def overlaid(image: "Tensor", heat: "Tensor") -> Any:
    """The image in grey and the heat map in colours, as if two slides were thrown on one wall.

    So light strokes stay visible in dark places as in bright ones. Shape (4 H, 4 W, 3).
    """
    import matplotlib
    import torch

    grey = image.float().mean(dim=0).repeat_interleave(ZOOM, 0).repeat_interleave(ZOOM, 1) / 255
    large = torch.nn.functional.interpolate(
        heat[None, None], scale_factor=ZOOM, mode="bilinear", align_corners=False
    )[0, 0].cpu()
    colors = torch.from_numpy(matplotlib.colormaps["inferno"](large.numpy())[..., :3]).float()
    mixed = 1 - (1 - 0.75 * colors) * (1 - 0.6 * grey[..., None])
    return (255 * mixed).round().to(torch.uint8).numpy()


def encoded(pixels: Any) -> bytes:
    """Pixels, (H, W) of grey or (H, W, 3) of colours, as PNG."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG", optimize=True)
    return held.getvalue()


def contact_sheet(pictures: Sequence[tuple[Any, list[str]]]) -> bytes:
    """All pictures, (H, W) or (H, W, 3), with their words below them in one PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // COLUMNS)
    lines = max(len(words) for _, words in pictures)
    with matplotlib.rc_context({"font.size": 9, "text.color": TEXT, "text.parse_math": False}):
        figure = Figure(figsize=(WIDTH, rows * (0.95 + 0.16 * lines)), layout="constrained")
        for axes in figure.subplots(rows, COLUMNS, squeeze=False).flat:
            axes.axis("off")
        for axes, (pixels, words) in zip(figure.axes, pictures, strict=False):
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            shown = [textwrap.shorten(line, 18, placeholder="…") for line in words]
            axes.text(0.5, -0.04, "\n".join(shown), transform=axes.transAxes, ha="center",
                      va="top")  # fmt: skip
        return png_of(figure)
