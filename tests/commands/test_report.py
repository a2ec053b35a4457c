"""The report: its numbers are those of the run folders, in both of its forms."""

import base64
import html
import io
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from distcv.config import InputError, Recipe, load_recipe
from distcv.data import DATASETS
from distcv.data.readers import Arrays
from distcv.models import MODELS, build_model
from distcv.report.charts import Series, accuracy_limits, spans_decades
from distcv.report.gradcam import grad_cam
from distcv.report.matrices import confusion_chart
from distcv.report.records import Group, Record, finite, read_groups
from distcv.report.tables import facts, hardware_of, summary
from distcv.results import Run, duration, read_runs
from support.report_runs import COMMIT, START, call, made_report, make_run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, mnist: Arrays) -> Path:
    """The report of `make_runs`."""
    return made_report(tmp_path_factory.getbasetemp(), data_dir)


def html_tables(text: str) -> list[list[list[str]]]:
    """The cells of the rows of all tables."""
    tables = re.findall(r"<table>.*?</table>", text, re.S)
    return [
        [
            [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)
        ]
        for table in tables
    ]


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [
        [[re.sub(r"\\(.)", r"\1", cell) for cell in line[2:-2].split(" | ")] for line in block
         if not line.startswith("| ---")]
        for block in blocks
    ]  # fmt: skip


@pytest.mark.slow
def test_the_table_holds_the_figures_of_the_result_files(made: Path) -> None:
    """The results table would state accuracies and intervals that are not those of the runs."""
    table = html_tables((made / "index.html").read_text())[0]
    own = load_recipe("gap")
    assert table[0][1] == f"gap, lr {own.lr}" and table[0][3] == "gap_9k"
    column, other = ({row[0]: row[at] for row in table[1:]} for at in (1, 3))
    values = [99.3, 99.4, 99.5]
    assert column["Target"] == "99.4: reached by 2 of 3 runs"
    assert column["Parameters"] == "9,490" and other["Parameters"] == "9,180"
    assert column["Runs"] == "n = 3, seeds 0, 1, 2; 1 not finished"
    assert column["Last test accuracy"] == f"99.40 ± {statistics.stdev(values):.2f}"
    half = 4.303 * statistics.stdev(values) / 3**0.5  # Student's t, two degrees of freedom
    assert column["95 % interval of mean"] == f"{99.4 - half:.2f} to {99.4 + half:.2f}"
    assert other["Last test accuracy"] == "99.20" and other["95 % interval of mean"] == "–"
    assert other["Best test accuracy"] == "99.60 (epoch 2)"
    assert other["First test accuracy"] == "95.00 (epoch 1)"
    assert other["Last train accuracy"] == "98.70"
    assert other["Last test loss"] == "0.0333" and other["Last train loss"] == "0.1667"
    assert column["Time"] == "44 s" and column["Hardware"] == "AMD EPYC, 2 cores"
    assert "the last epoch is 0.40 points below the best" in other["Analysis"]


def test_html_and_markdown_hold_the_same(made: Path) -> None:
    """Readers of report.md would see other numbers than readers of index.html, or lack images."""
    page, markdown = ((made / name).read_text() for name in ("index.html", "report.md"))
    assert html_tables(page) == markdown_tables(markdown)
    assert len(html_tables(page)) == 4
    shown = re.findall(r"\]\((.*?)\.png\)", markdown)
    assert {f"{name}.png" for name in shown} == {path.name for path in made.glob("*.png")}
    curves = {f"{part}-{what}" for part in ("train", "test") for what in ("accuracy", "loss")}
    course = {"lr", "grad-norm", "images-per-second", "memory-mib"}
    assert curves | course | {"class-accuracy-mnist", "confusion-1", "mistakes-1"} < set(shown)
    said = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert said == re.findall(r"^## (.*)$", markdown, re.M)
    for name in shown:
        with Image.open(made / f"{name}.png") as image:
            assert image.width == 600


def test_the_summary_comes_first_and_names_what_was_measured(made: Path) -> None:
    """A reader would have to search the page for the accuracy, n, interval, time and hardware."""
    first = (made / "report.md").read_text().splitlines()[2]
    assert first.startswith(
        f"- **gap on mnist, lr {load_recipe('gap').lr}: 99.40 ± 0.10\N{NO-BREAK SPACE}%**"
    )
    for words in (
        "last epoch",
        "n = 3",
        "95\N{NO-BREAK SPACE}%",
        "44 s",
        "AMD EPYC",
        "2 of 3 runs",
    ):
        assert words in first


def test_the_page_is_one_file_of_unique_ids_without_paths(made: Path) -> None:
    """A report sent by mail would lose its pictures, or reveal its author's host name and paths."""
    page = (made / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) > 100 and len(ids) == len(set(ids))
    for used in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert used in ids
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page and "DejaVu" not in page
    everything = page + (made / "report.md").read_text()
    for secret in ("secret-host", "/secret/place", str(made.parent), str(made.parents[1])):
        assert secret not in everything
    assert len(page) < 1.5e6


@pytest.mark.slow
def test_the_same_runs_give_the_same_files(
    made: Path, tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report made again from the same runs would show up as changed in version control."""
    call(monkeypatch, made.parent / "runs", "--output", tmp_path, "--target", 99.4,
         "--data-dir", data_dir)  # fmt: skip
    for path in made.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_mistakes_show_the_very_images_of_the_test_set(made: Path, mnist: Arrays) -> None:
    """The gallery of mistakes would show another image than the one that was misclassified."""
    page = (made / "index.html").read_text()
    source = re.search(r'alt="Test image 7: label 9, predicted 4" src="([^"]*)"', page)
    assert source
    with Image.open(io.BytesIO(base64.b64decode(source[1].split(",")[1]))) as image:
        assert np.array_equal(np.asarray(image), np.asarray(mnist[2][7]).reshape(28, 28))
    assert "<span>9 → 4</span><span>99.8 %</span><span>3 of 3 runs</span>" in page


def test_heat_maps_are_shown_of_right_and_wrong_predictions(made: Path, mnist: Arrays) -> None:
    """The heat maps would omit wrong predictions, or give an image the label of another one."""
    page = (made / "index.html").read_text()
    pairs = re.findall(r'alt="Heat map on test image (\d+): label (\d), predicted (\d)"', page)
    assert len([pair for pair in pairs if pair[1] == pair[2]]) >= 2
    assert len([pair for pair in pairs if pair[1] != pair[2]]) >= 2
    for sample, label, _ in pairs:
        assert int(mnist[3][int(sample)]) == int(label)


def test_what_older_and_unfinished_runs_lack_is_said(made: Path) -> None:
    """A reader would not learn why an old or unfinished run lacks its matrix or heat maps."""
    text = (made / "report.md").read_text()
    assert "No confusion matrix for gap, lr 0.3: not finished, or by an older version." in text
    assert "gap, lr 0.3: no finished run lists its mistakes" in text
    assert "old: no last checkpoint in old/checkpoints" in text
    runs = {row[0]: row for row in markdown_tables(text)[1]}
    assert runs["open"][3] == "94.00 at epoch 2 of 3, not finished"
    assert runs["gap-1"][2:8] == ["1", "99.40", "0.0333", "44 s", COMMIT[:12], "2026-11-21 18:37"]


def test_only_differences_are_listed(made: Path) -> None:
    """Dozens of equal fields would hide the few in which recipes and environments differ."""
    environments, recipes = markdown_tables((made / "report.md").read_text())[2:]
    named = {row[0] for row in recipes[1:]}
    assert {"model", "lr"} <= named and not {"seed", "epochs", "dataset"} & named
    assert [row[:2] for row in environments[1:]] == [["threads", "2"], ["threads", "1"]]
    assert environments[2][2] == "old"


@pytest.mark.slow
def test_without_the_data_set_the_rest_is_reported(
    tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who is offline and has no copy of the data set would get no report at all."""
    folder = make_run(tmp_path / "one", weights=True)
    call(monkeypatch, folder, "--data-dir", tmp_path / "empty")
    text = (folder / "report/report.md").read_text()
    assert text.count("The test images of mnist could not be had") == 2
    assert "Confusion" in text and (folder / "report/test-loss.png").exists()


def test_a_run_that_has_just_begun_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A report on a run without a finished epoch would end in a traceback."""
    folder = make_run(tmp_path / "new", accuracies=(), finished=False)
    (folder / "metrics.jsonl").write_text('{"event": "train", "st')
    (folder / "environment.json").unlink()
    call(monkeypatch, folder, "--output", tmp_path / "out")
    text = (tmp_path / "out/report.md").read_text()
    assert "nothing was evaluated yet" in text and "no step yet" in text
    assert "No epoch was finished yet." in text


def test_the_least_that_a_result_can_say_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A result.json that holds only accuracy and time would make the report fail."""
    folder = make_run(tmp_path / "least", accuracies=(), finished=False)
    (folder / "result.json").write_text('{"test_accuracy": 99.25, "seconds": 10.0}')
    call(monkeypatch, folder, "--output", tmp_path / "out", "--data-dir", tmp_path)
    text = (tmp_path / "out/report.md").read_text()
    assert "| Best test accuracy | 99.25 (epoch 3) |" in text and "| Epochs | 3 |" in text


def test_of_a_run_that_goes_on_the_newest_epoch_counts_so_far(tmp_path: Path) -> None:
    """An unfinished run would be reported by its best epoch, and a missed target as reached."""
    runs, _ = read_runs((make_run(tmp_path / "a", accuracies=(91.0, 94.5, 93.0), finished=False),))
    (group,) = read_groups(runs)
    lines = facts(group, 94)
    assert lines["Last test accuracy"] == "93.00" and lines["Target"] == "94: not reached"
    assert lines["Best test accuracy"] == "94.50 (epoch 2)" and lines["Runs"] == "1 not finished"
    assert summary(group, None)[1] == " test accuracy at epoch 3 of 3 (n = 1); not finished."


@pytest.mark.parametrize("name", MODELS)
def test_grad_cam_finds_a_map_in_every_network(name: str) -> None:
    """The report would have no heat maps for one of the built-in networks."""
    torch.manual_seed(0)
    home = DATASETS[MODELS[name].dataset]
    network = build_model(name, channels=home.shape[0], classes=10).eval().requires_grad_(False)
    images = torch.randint(0, 256, (2, *home.shape), dtype=torch.uint8)
    heat, logits = grad_cam(network, lambda raw: network(raw / 255), images)
    assert heat.shape == (2, *home.shape[1:]) and logits.shape == (2, 10)
    assert float(heat.min()) >= 0 and float(heat.max()) <= 1
    assert torch.equal(logits, network(images / 255))


def test_grad_cam_weights_the_map_by_its_gradient() -> None:
    """Heat maps would mark pixels that speak against the predicted class as speaking for it."""
    copy = nn.Conv2d(1, 2, 1, bias=False)  # two copies of the image
    copy.weight.data = torch.ones(2, 1, 1, 1)
    whole = nn.Conv2d(2, 2, 4, bias=False)  # gives 1 x 1: the map before it is to be taken
    whole.weight.data = torch.tensor([3.0, -1.0]).view(2, 1, 1, 1).expand(2, 2, 4, 4) / 16
    network = nn.Sequential(copy, whole, nn.Flatten()).requires_grad_(False)
    images = torch.rand(3, 1, 4, 4) * 255
    before = images.clone()
    heat, _ = grad_cam(network, lambda raw: network(raw.sub_(0)), images)
    assert torch.allclose(heat, images[:, 0] / images.amax(dim=(2, 3))[..., None])
    assert torch.equal(images, before), "logits_of may work in place"
    whole.weight.data.mul_(-1)  # the second class wins now, by as much as it sees of the image
    whole.weight.data[1] *= -1
    assert not grad_cam(network, lambda raw: network(raw), images)[0].any(), "all speaks against"


def test_means_are_over_the_points_that_all_runs_have() -> None:
    """The mean curve would jump at the epoch where one of the runs has stopped."""
    series = Series("a", [[(1.0, 2.0), (2.0, 4.0)], [(1.0, 4.0), (2.0, 5.0), (3.0, 9.0)]])
    assert series.mean == [(1.0, 3.0), (2.0, 4.5)]
    assert Series("empty", []).mean == []


def test_axes_show_where_the_curves_end() -> None:
    """Accuracy charts would squeeze the last percent, where runs differ, into a flat line."""
    rising = Series("a", [[(1.0, 85.0), (2.0, 98.0), (3.0, 99.25)]])
    low, high = accuracy_limits([rising])
    assert 96.5 < low < 97 and 99.25 < high <= 100.2
    slow = Series("b", [[(1.0, 30.0), (2.0, 50.0)]])
    assert accuracy_limits([slow])[0] < 30
    assert spans_decades([Series("c", [[(1.0, 2.0), (2.0, 0.1)]])])
    assert not spans_decades([Series("d", [[(1.0, 2.0), (2.0, 0.3)]])])


def test_a_hundred_classes_become_a_picture_of_reasonable_size() -> None:
    """The confusion matrix of CIFAR-100 would add megabytes to the page that a user sends."""
    counts = [[90 if i == j else (i * j) % 2 for j in range(100)] for i in range(100)]
    counts[3][5] = 44
    recipe = Recipe(model="resnet18", dataset="cifar100")
    record = Record("r", Run(Path("r"), recipe, {"confusion": counts}), [], [], [])
    classes = DATASETS["cifar100"].classes
    chart = confusion_chart("c", "Confusion", Group("resnet18", [record]), classes)
    assert chart and len(chart.svg) < 60_000
    assert f"Most often: {classes[3]} taken for {classes[5]} (44)" in chart.caption


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "AMD EPYC, 2 cores"),
        ({"threads": "1"}, "AMD EPYC, 2 cores, 1 thread"),
        ({"processes": 2, "strategy": "ddp"}, "AMD EPYC, 2 cores, 2 processes (ddp)"),
        ({"device": "NVIDIA H200"}, "NVIDIA H200"),
        ({"device": "NVIDIA H200", "processes": 8, "nodes": 2, "strategy": "fsdp2"},
         "8 x NVIDIA H200 on 2 nodes (fsdp2)"),
    ],
)  # fmt: skip
def test_hardware_in_words(fields: dict[str, Any], said: str) -> None:
    """A reader could not tell on how many GPUs, nodes or threads a time was measured."""
    record = Record("r", Run(Path("r"), Recipe(), None), [], [], [START | fields])
    assert hardware_of(record) == said


def test_durations_in_words() -> None:
    """Training times would read `60 s` or `6120 s` instead of minutes and hours."""
    assert [duration(s) for s in (43.4, 59.6, 725, 6120)] == [
        "43 s", "1 min 0 s", "12 min 5 s", "1 h 42 min",
    ]  # fmt: skip


def test_wrong_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong folder or an unusable `--output` would end in a traceback instead of a remedy."""
    (tmp_path / "file").write_text("")
    (tmp_path / "none").mkdir()
    folder = make_run(tmp_path / "run", accuracies=(), finished=False)
    with pytest.raises(InputError, match="train first"):
        call(monkeypatch, tmp_path / "none")
    with pytest.raises(InputError, match="choose another --output"):
        call(monkeypatch, folder, "--output", tmp_path / "file/report", "--data-dir", tmp_path)
    ran = subprocess.run([sys.executable, "-m", "distcv.report", str(tmp_path / "missing")],
                         capture_output=True, text=True, timeout=60)  # fmt: skip
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert ran.stderr.startswith("error: no folder")


def test_only_what_can_be_drawn_is_drawn() -> None:
    """One NaN or infinite value in metrics.jsonl would break the charts of the report."""
    values = [1, 2.5, float("nan"), float("inf"), 1e308, "3", None, [4]]
    rows = [{"epoch": epoch, "x": value} for epoch, value in enumerate(values)]
    assert finite([*rows, {"epoch": 1e308, "x": 1}], "x") == [(0, 1), (1, 2.5)]
