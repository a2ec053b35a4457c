"""A network that comes out of its run folder is the one that was evaluated."""

from pathlib import Path

import pytest
import torch

from distcv import checkpoint
from distcv.config import InputError
from distcv.trained import open_run
from distcv.training import load_data
from support.runs import Runs

pytestmark = pytest.mark.slow  # its runs take some seconds


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """A run of two epochs with a moving average."""
    folder = tmp_path_factory.mktemp("trained")
    runs = Runs(folder, folder / "data")
    flags = "--model gap --dataset synthetic --ema-decay 0.5 --batch-size 250 --epochs 2"
    runs.run("r", *flags.split())
    return runs


def test_it_predicts_what_was_evaluated(runs: Runs) -> None:
    """`predict` and `export` would use other weights than those that result.json describes."""
    result = runs.result("r")
    opened = open_run(runs.folder / "r")
    data = load_data(opened.recipe, runs.folder / "data", print)
    logits = torch.cat([opened.logits(part) for part in data.test_images.split(1000)])
    predicted, right = logits.argmax(1), data.test_labels
    assert 100 * (predicted == right).double().mean() == pytest.approx(result["test_accuracy"])
    table = torch.zeros(10, 10, dtype=torch.int64)
    table.index_put_((right, predicted), torch.ones(len(right), dtype=torch.int64), accumulate=True)
    assert result["confusion"] == table.tolist()
    wrong = {one["sample"]: one["predicted"] for one in result["mistakes"]}
    assert len(wrong) == min(64, int((predicted != right).sum())) > 0
    assert {sample: int(predicted[sample]) for sample in wrong} == wrong
    sure = [one["confidence"] for one in result["mistakes"]]
    highest = logits.softmax(1).amax(1)[predicted != right].sort(descending=True).values
    assert sure == pytest.approx(highest[: len(sure)].tolist(), rel=1e-4)


def test_the_best_one_is_found(runs: Runs) -> None:
    """A user who asks for the best checkpoint with `--which best` would get the last one."""
    folder = runs.folder / "r/checkpoints"
    first, last = checkpoint.steps(folder)
    held = checkpoint.load(folder / f"step-{last:08d}")
    assert held.state["progress"]["best_step"] == last, "it learns"
    assert open_run(runs.folder / "r", which="best").step == last
    held.state["progress"]["best_step"] = first
    checkpoint.save(folder, last, held)
    checkpoint.prune(folder, keep=set())
    assert open_run(runs.folder / "r", which="best").step == first
    assert open_run(runs.folder / "r").step == last


def test_a_damaged_checkpoint_is_passed_by(runs: Runs) -> None:
    """`predict` and `export` would fail on, or use, a damaged checkpoint beside a good one."""
    folder = runs.folder / "r/checkpoints"
    first, last = (f"step-{step:08d}" for step in checkpoint.steps(folder))
    assert open_run(runs.folder / "r").checkpoint.name == last
    weights = folder / last / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    try:
        assert open_run(runs.folder / "r").checkpoint.name == first
    finally:
        weights.write_bytes(whole)


def test_a_checkpoint_that_is_whole_and_of_no_training_is_refused(
    runs: Runs, tmp_path: Path
) -> None:
    """A checkpoint of another network or version would end `predict` in a traceback."""
    held = checkpoint.load(runs.folder / "r/checkpoints/step-00000080")
    (tmp_path / "config.yaml").write_bytes((runs.folder / "r/config.yaml").read_bytes())
    for tensors, state in (
        ({"model": {"x": torch.zeros(1)}}, held.state),
        ({"optimizer": held.tensors["optimizer"]}, held.state),
        (held.tensors, {}),
        (held.tensors, held.state | {"step": "\x1b[2J"}),
    ):
        checkpoint.save(tmp_path / "checkpoints", 80, checkpoint.Checkpoint(tensors, state))
        with pytest.raises(InputError, match="no checkpoint of gap"):
            open_run(tmp_path)
    other = checkpoint.Checkpoint(held.tensors, held.state | {"progress": []})
    checkpoint.save(tmp_path / "checkpoints", 80, other)
    with pytest.raises(InputError, match=r"state\.json of another version"):
        open_run(tmp_path, which="best")


def test_what_is_no_run_is_refused_in_one_line(runs: Runs, tmp_path: Path) -> None:
    """A mistyped or unfinished run folder would end `predict` and `export` in a traceback."""
    with pytest.raises(InputError, match=r"no run in .*nowhere"):
        open_run(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_bytes((runs.folder / "r/config.yaml").read_bytes())
    with pytest.raises(InputError, match="no last checkpoint"):
        open_run(empty)
