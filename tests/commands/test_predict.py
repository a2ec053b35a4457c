"""Image files of every kind through a network, as the tensors of the data set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distcv import predict
from distcv.config import InputError
from distcv.data.readers import Arrays
from distcv.predict import has_bright_border, read_image
from distcv.trained import open_run
from support.data_files import png
from support.runs import RIGHTS_HOLD
from support.trained_runs import BEST, make_trained_run

GRAY, RGB = (1, 28, 28), (3, 32, 32)


@pytest.fixture(scope="module")
def run(mnist: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = torch.from_numpy(mnist.train_images[:256])
    return make_trained_run(tmp_path_factory.mktemp("runs") / "gap", images)


@pytest.fixture
def digits(mnist: Arrays, tmp_path: Path) -> Path:
    """A folder of ten test images as PNG files, one of them deeper."""
    folder = tmp_path / "digits"
    (folder / "more").mkdir(parents=True)
    for i in range(10):
        place = folder / "more" if i == 9 else folder
        Image.fromarray(mnist.test_images[i, 0]).save(place / f"{i}.png")
    return folder


def predicted(
    patch: pytest.MonkeyPatch, *words: Any, json_file: Path
) -> tuple[int, list[dict[str, Any]]]:
    words = (*words, "--json", json_file)
    patch.setattr(sys, "argv", ["x", *map(str, words)])
    return predict.main(), json.loads(json_file.read_text())


@pytest.mark.parametrize("which", ["last", "best"])
def test_pictures_of_a_data_set_give_the_logits_of_its_tensors(
    which: Any, run: Path, digits: Path, mnist: Arrays, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An image file would get other probabilities than the same image in the test set."""
    flags = ("--which", which, "--top", 99)
    code, rows = predicted(monkeypatch, run, digits, *flags, json_file=tmp_path / "out/p.json")
    assert code == 0
    names = [f"{i}.png" for i in range(9)] + ["more/9.png"]
    assert [row["path"] for row in rows] == [str(digits / name) for name in names]
    trained = open_run(run, which=which)
    with torch.no_grad():
        probabilities = trained.logits(torch.from_numpy(mnist.test_images[:10])).softmax(1)
    assert (trained.step == BEST) == (which == "best")
    for row, expected in zip(rows, probabilities, strict=True):
        found = {entry["class"]: entry["probability"] for entry in row["classes"]}
        assert found == {str(k): float(p) for k, p in enumerate(expected)}, "to the last bit"
        assert list(found.values()) == sorted(found.values(), reverse=True)
    first = capsys.readouterr().out.splitlines()[0]
    likeliest = rows[0]["classes"][0]
    said = f"{likeliest['class']} {100 * likeliest['probability']:.1f} %"
    assert first.startswith(f"{digits}/0.png  {said}  ") and first.count("%") == 10


def test_files_that_cannot_be_read_are_named_and_the_others_predicted(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One damaged image would end the prediction of a whole folder, or be left out unmentioned."""
    (digits / "0.png").write_bytes((digits / "0.png").read_bytes()[:90])
    (digits / "1.png").write_text("no image")
    (digits / "notes.txt").write_text("not taken for an image")
    (digits / ".2.png").write_text("hidden")
    (tmp_path / "empty").mkdir()
    words = (run, digits, tmp_path / "none.png", tmp_path / "empty")
    code, rows = predicted(monkeypatch, *words, json_file=tmp_path / "p.json")
    out, err = capsys.readouterr()
    assert code == 2 and len(rows) == len(out.splitlines()) == 8
    assert [len(row["classes"]) for row in rows] == [3] * 8
    names = [line.split(": ")[0].removeprefix("skipped ") for line in err.splitlines()]
    bad = ("empty", "digits/0.png", "digits/1.png", "none.png")
    assert names == [str(tmp_path / name) for name in bad]


def test_ink_on_paper_is_inverted_when_asked_and_noticed_when_not(
    run: Path, digits: Path, mnist: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Scans of black ink on white paper would be misclassified without a hint at `--invert`."""
    Image.fromarray(255 - mnist.test_images[3, 0]).save(tmp_path / "ink.png")
    files = (tmp_path / "ink.png", digits / "0.png")
    _, plain = predicted(monkeypatch, run, *files, json_file=tmp_path / "p.json")
    *_, hint = capsys.readouterr().out.splitlines()
    assert hint == (
        "hint: 1 of 2 images are brighter at the border than in the middle; mnist is white on "
        "black: try --invert"
    )
    _, paper = predicted(monkeypatch, run, files[0], "--invert", json_file=tmp_path / "p.json")
    assert "hint" not in capsys.readouterr().out
    _, white = predicted(monkeypatch, run, digits / "3.png", json_file=tmp_path / "p.json")
    assert paper[0]["classes"] == white[0]["classes"] != plain[0]["classes"]
    assert not any(has_bright_border(image) for image in mnist.test_images[:1000])


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_every_mode_of_a_picture_becomes_the_same_pixels(tmp_path: Path, mnist: Arrays) -> None:
    """The same digit would get another class as a 16-bit PNG, with a palette or as WebP."""
    pixels = mnist.test_images[0]
    gray = Image.fromarray(pixels[0])
    sixteen = Image.fromarray(pixels[0].astype(np.uint16) * 257)
    palette = gray.convert("RGB").quantize(256)
    cases = {
        "rgb.png": gray.convert("RGB"), "rgba.png": gray.convert("RGBA"), "16.png": sixteen,
        "16.tif": sixteen, "palette.png": palette, "la.png": gray.convert("LA"), "x.bmp": gray,
        "x.webp": (gray.convert("RGB"), {"lossless": True}),
        "x.gif": (gray, {"save_all": True, "append_images": [Image.new("L", (28, 28), 255)]}),
    }  # fmt: skip
    for name, case in cases.items():
        image, options = case if isinstance(case, tuple) else (case, {})
        found = read_image(save(tmp_path / name, image, **options), GRAY)
        assert found.dtype == np.uint8 and found.shape == GRAY
        assert np.array_equal(found, pixels), name


def test_transparency_is_white_and_cameras_that_were_held_sideways_are_turned_back(
    tmp_path: Path,
) -> None:
    """Transparent parts of an image would turn black, and phone photos would stay on their side."""
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    clear.putpixel((3, 5), (10, 20, 30, 255))
    for name, image in {"a.png": clear, "p.png": clear.quantize(4)}.items():
        found = read_image(save(tmp_path / name, image), RGB)
        assert found[:, 5, 3].tolist() == [10, 20, 30], name
        assert (found[:, :5] == 255).all(), name
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    path = save(tmp_path / "side.png", Image.fromarray(pixels), exif=exif)
    turned = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert np.array_equal(read_image(path, RGB), turned)


def test_other_sizes_are_shrunk_smoothly_and_unknown_pixels_refused(tmp_path: Path) -> None:
    """Large photos would alias into noise, and an EPS file could run code through Ghostscript."""
    board = 255 * (np.indices((320, 320)).sum(0) % 2).astype(np.uint8)
    small = read_image(save(tmp_path / "board.png", Image.fromarray(board)), GRAY)
    assert abs(small.astype(int) - 127).max() <= 2, "a pixel is a mean, not a sample"
    wide = read_image(save(tmp_path / "w.jpg", Image.new("CMYK", (90, 20))), RGB)
    assert wide.shape == RGB and wide.min() > 250
    with pytest.raises(ValueError, match="no known range"):
        read_image(save(tmp_path / "f.tif", Image.fromarray(np.ones((9, 9), np.float32))), GRAY)
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(OSError, match="cannot identify"):
        read_image(tmp_path / "x.eps", GRAY)


def test_no_images_and_a_device_that_is_not_there_are_refused(
    run: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call without images would seem to succeed, or a wrong `--device` give a traceback."""
    with pytest.raises(InputError, match=r"^no images: name files or folders"):
        predicted(monkeypatch, run, json_file=tmp_path / "p.json")
    for device in ("gpu", "cuda:99", "meta", "hpu"):
        with pytest.raises(InputError, match=f"^--device {device}: .*: choose another$"):
            predicted(monkeypatch, run, digits, "--device", device, json_file=tmp_path / "p.json")


@pytest.mark.slow
def test_the_command_ends_with_a_line_and_code_2_for_what_is_no_run(tmp_path: Path) -> None:
    """A script that predicts from a wrong run folder would get a traceback, not exit code 2."""
    words = [sys.executable, "-m", "distcv.predict", str(tmp_path), str(tmp_path / "a.png")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: no run in {tmp_path}") and ran.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "checkpoints", "config.yaml"])
def test_a_run_that_may_not_be_read_is_named_in_a_line(
    name: str, run: Path, digits: Path, tmp_path: Path
) -> None:
    """A user without read permission would get a traceback instead of the file's name."""
    secret = shutil.copytree(run, tmp_path / "run") / name
    secret.chmod(0)
    words = [*RIGHTS_HOLD, sys.executable, "-m", "distcv.predict", str(tmp_path / "run")]
    ran = subprocess.run([*words, str(digits)], capture_output=True, text=True, timeout=120)
    secret.chmod(0o700)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert str(secret) in ran.stderr and "Permission denied" in ran.stderr


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (8193, 8192, r"8193x8192 are more than 67,108,864 pixels"),
        (10_000, 10_000, r"10000x10000 are more than"),
        (60_000, 60_000, "decompression bomb"),
        (2**31 - 1, 2**31 - 1, "decompression bomb|cannot identify"),
    ],
)
def test_an_image_with_too_many_pixels_is_not_decoded(
    width: int, height: int, reason: str, tmp_path: Path
) -> None:
    """A small crafted PNG could fill the memory of the machine that predicts it."""
    (tmp_path / "bomb.png").write_bytes(png(width, height))
    with pytest.raises(Exception, match=reason):
        read_image(tmp_path / "bomb.png", RGB)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """A named pipe given as an image would make the command wait forever."""
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read_image(tmp_path / "x.png", RGB)
