"""Networks as files for other programs: equal logits, nothing of this machine, a card that runs."""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors
import torch
from huggingface_hub import ModelCard

from distcv import export
from distcv.config import InputError, load_recipe
from distcv.data.readers import Arrays
from distcv.export import FILES, formats
from distcv.trained import open_run
from faults.small_disks import can_mount, small_disk
from support.runs import ROOT
from support.trained_runs import BEST, STEP, make_trained_run


@pytest.fixture(scope="module")
def images(mnist: Arrays) -> torch.Tensor:
    return torch.from_numpy(mnist.test_images[:300])


@pytest.fixture(scope="module")
def run(images: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trained_run(tmp_path_factory.mktemp("runs") / "gap", images)


@pytest.fixture(scope="module")
def exported(
    run: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """The folder of each format, all made in this process."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        for to in FILES:
            folders[to] = tmp_path_factory.mktemp("exported") / to
            call(patch, run, "--to", to, "--output", folders[to], "--data-dir", data_dir)
    yield folders


def call(patch: pytest.MonkeyPatch, *words: Any) -> None:
    patch.setattr(sys, "argv", ["x", *map(str, words)])
    export.main()


def code_of(card: str) -> tuple[str, str]:
    """The example of a card: the lines that make up images, and those that use them."""
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert found is not None
    example, program = found[1].split("\n\n")
    return example, program


@pytest.mark.slow
@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_the_code_on_the_card_gives_the_logits_of_the_network(
    to: str, count: int, exported: dict[str, Path], run: Path, images: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Code copied from a model card would fail, or give other logits than the trained network."""
    monkeypatch.chdir(exported[to])
    example, program = code_of(Path("README.md").read_text())
    names: dict[str, Any] = {}
    exec(example, names)
    assert tuple(names["images"].shape) == (1, 1, 28, 28)
    exec(program, names)
    assert tuple(names["logits"].shape) == (1, 10)
    given = images[:count]
    names["images"] = given.numpy() if to == "onnx" else given
    exec(program, names)
    with torch.no_grad():
        expected = open_run(run).logits(given)
    found = torch.as_tensor(names["logits"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(found.argmax(1), expected.argmax(1))


def properties(path: Path) -> dict[str, str]:
    """What a file tells about its network."""
    if path.suffix == ".onnx":
        return {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    if path.suffix == ".pt2":
        extra = {"about.json": ""}
        torch.export.load(path, extra_files=extra)
        return dict(json.loads(extra["about.json"]))
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.slow
@pytest.mark.parametrize("to", FILES)
def test_a_file_tells_what_it_holds_and_nothing_of_the_machine(
    to: str, exported: dict[str, Path], run: Path
) -> None:
    """A published file would lack its class names, or reveal the paths of its author's machine."""
    about = properties(exported[to] / FILES[to])
    assert json.loads(about["classes"]) == list("0123456789")
    assert json.loads(about["mean"]) == [0.1306604] and json.loads(about["std"]) == [0.3081078]
    assert about["commit"] == "c" * 40 and about["step"] == str(STEP)
    assert about["config_sha256"] == load_recipe(run / "config.yaml").sha256
    assert sorted(path.name for path in exported[to].iterdir()) == ["README.md", FILES[to]]
    for path in exported[to].iterdir():
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            contents += [archive.read(name) for name in archive.namelist()]
        for trace in (str(ROOT), str(Path.home()), str(run.parent), "site-packages", '.py"'):
            assert not any(trace.encode() in content for content in contents), trace


def test_onnx_names_its_input_and_output_and_leaves_the_batch_free(
    exported: dict[str, Path],
) -> None:
    """ONNX code would fail on the input name `images`, or on a batch of another size."""
    graph = onnx.load(exported["onnx"] / "model.onnx").graph
    (images,), (logits,) = graph.input, graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    batch, *sizes = images.type.tensor_type.shape.dim
    assert batch.dim_param == "batch" and [size.dim_value for size in sizes] == [1, 28, 28]


@pytest.mark.parametrize("to", FILES)
def test_the_card_states_what_was_measured(to: str, exported: dict[str, Path]) -> None:
    """The Hugging Face page of a network would show a wrong accuracy or the wrong data set."""
    card = ModelCard((exported[to] / "README.md").read_text())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.125)
    assert (result.dataset_type, result.dataset_split) == ("ylecun/mnist", "test")
    assert card.data.datasets == ["ylecun/mnist"] and card.data.license is None
    for words in (
        "9,490 parameters, 7 convolutions and linear layers",
        "12.50 % of the 10,000 test images, with a loss of 2.2500: one run (n = 1, seed 0), after "
        "2 of 8 epochs, without test-time augmentation.",
        "on 100 test images, one at a time and together, its predictions are the network's",
        f"- commit: {'c' * 40}",
        "Parameters: 9,490",
    ):
        assert words in card.content


def test_the_best_checkpoint_can_be_chosen_and_takes_the_place_of_an_earlier_export(
    run: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--which best` would export the last checkpoint, or a second export would be refused."""
    made = run / "export/safetensors"
    for which, step in (("last", STEP), ("best", BEST)):
        call(monkeypatch, run, "--to", "safetensors", "--which", which, "--data-dir", data_dir)
        assert properties(made / "model.safetensors")["step"] == str(step)
    card = (made / "README.md").read_text()
    assert "value: 0.3\n" in card and "chosen for its accuracy on these very images" in card
    out, err = capsys.readouterr()
    assert out.count("its predictions are the network's") == 2 and not err


def test_a_file_of_other_logits_is_refused_and_not_kept(
    run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user would deploy an exported file whose predictions are not those of the network."""

    def spoilt(trained: Any, about: dict[str, str]) -> bytes:
        return formats.make_safetensors(open_run(run, which="best"), about)

    monkeypatch.setitem(formats.MAKE, "safetensors", spoilt)
    words = (run, "--to", "safetensors", "--output", tmp_path / "x", "--data-dir", data_dir)
    with pytest.raises(InputError, match=r"^the exported network is not .*: nothing was writ"):
        call(monkeypatch, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("to", FILES)
def test_a_full_disk_is_told_in_a_line_and_nothing_is_left_on_it(
    to: str, run: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk would end the export in a traceback and leave half a file behind."""
    if not can_mount(tmp_path / "disk"):
        pytest.skip("no right to mount a small disk")
    with small_disk(tmp_path / "disk", size="16k") as disk:
        words = (run, "--to", to, "--output", disk / "made", "--data-dir", data_dir)
        with pytest.raises(InputError, match=r"disk/made: No space left .*: choose another --out"):
            call(monkeypatch, *words)
        assert not list(disk.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("off", [2e-4, float("nan")])
def test_the_tolerance_is_that_of_the_largest_logit(
    off: float, run: Path, images: torch.Tensor
) -> None:
    """An export with NaN logits would pass the check, or harmless rounding would fail it."""
    trained = open_run(run)
    scale = float(trained.logits(images).abs().max())
    near = formats.check(trained, lambda x: trained.logits(x) + 0.5e-4 * scale, images)
    assert near.samples == 300 and near.scale == scale
    with pytest.raises(InputError, match="its logits differ"):
        formats.check(trained, lambda x: trained.logits(x) + off * scale, images)


def test_a_folder_of_other_files_is_left_alone(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export into the wrong folder would overwrite the README.md that a user keeps there."""
    (tmp_path / "README.md").write_text("of something else")
    with pytest.raises(InputError, match="holds other files: choose a new or empty folder"):
        call(monkeypatch, run, "--to", "onnx", "--output", tmp_path)
    with pytest.raises(InputError, match=r"README.md: Not a directory: choose another --output"):
        call(monkeypatch, run, "--to", "onnx", "--output", tmp_path / "README.md")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_packages_that_are_missing_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user without onnx would see an import error instead of the `pip install` command to run."""
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'dist"):
        call(monkeypatch, tmp_path / "none", "--to", "onnx")


@pytest.mark.slow
def test_a_residual_network_of_color_images_is_exported(
    data_dir: Path, cifar10: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ResNet-18 could not be exported, or its card would state an accuracy never measured."""
    images = torch.from_numpy(cifar10.train_images[:64])
    run = make_trained_run(tmp_path / "resnet", images, model="resnet18", ema_decay=0.9)
    (run / "metrics.jsonl").unlink()
    monkeypatch.setattr(export, "SAMPLES", 4)
    call(monkeypatch, run, "--to", "onnx", "--data-dir", data_dir)
    assert json.loads(properties(run / "export/onnx/model.onnx")["classes"])[8] == "ship"
    card = (run / "export/onnx/README.md").read_text()
    assert "as their moving average" in card and "These weights were not evaluated" in card


@pytest.mark.slow
def test_the_command_ends_with_a_line_and_code_2_for_what_is_no_run(tmp_path: Path) -> None:
    """A mistyped run folder would give a traceback instead of one line and exit code 2."""
    words = [sys.executable, "-m", "distcv.export", str(tmp_path), "--to", "torch-export"]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: no run in {tmp_path}") and ran.stderr.count("\n") == 1
