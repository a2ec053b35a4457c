"""Checkpoints: what goes in comes out, and what is damaged is noticed and kept."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from distcv import checkpoint
from distcv.checkpoint import Checkpoint
from distcv.config import InputError, Recipe
from distcv.models import build_model
from distcv.optim import OPTIMIZERS
from distcv.runtime.strategies import WholeCopies
from distcv.training import read_progress

STATE = {"progress": {"step": 3, "seconds": 0.1}, "seed": 7}


def example(value: float = 1.0) -> Checkpoint:
    return Checkpoint(
        {"model": {"w": torch.full((3, 4), value)}, "optimizer": {"w:m": torch.arange(5)}}, STATE
    )


def complaints() -> tuple[list[str], object]:
    said: list[str] = []
    return said, said.append


def test_round_trip(tmp_path: Path) -> None:
    """A resumed run would get other weights, optimizer state or progress than were saved."""
    checkpoint.save(tmp_path, 3, example())
    said, report = complaints()
    found = checkpoint.newest(tmp_path, report)  # type: ignore[arg-type]
    assert found == tmp_path / "step-00000003" and not said
    held = checkpoint.load(found)
    assert held.state == STATE
    assert torch.equal(held.tensors["model"]["w"], torch.ones(3, 4))
    assert torch.equal(held.tensors["optimizer"]["w:m"], torch.arange(5))
    files = {path.name for path in found.iterdir()}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_optimizer_state_goes_round_under_plain_names(
    name: str, memory_format: torch.memory_format, tmp_path: Path
) -> None:
    """A resumed run would take other steps, since its optimizer state would be lost or mixed up."""
    recipe = Recipe(optimizer=name, lr=0.01)  # type: ignore[arg-type]

    def built() -> tuple[torch.nn.Module, torch.optim.Optimizer, WholeCopies]:
        torch.manual_seed(0)
        model = build_model("gap", channels=1, classes=10).to(memory_format=memory_format)
        optimizer = OPTIMIZERS[name](model, recipe)
        strategy = WholeCopies(recipe)
        strategy.adopt(model, optimizer)
        return model, optimizer, strategy

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        model(torch.randn(8, 1, 28, 28)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, strategy = built()
    step(model, optimizer, 1)
    tensors = dict(strategy.optimizer_tensors())
    assert {key.rsplit(":", 1)[0] for key in tensors} == {n for n, _ in model.named_parameters()}
    checkpoint.save(
        tmp_path, 1, Checkpoint({"model": model.state_dict(), "optimizer": tensors}, {})
    )

    held = checkpoint.load(tmp_path / "step-00000001")
    again, again_optimizer, strategy = built()
    with torch.no_grad():
        strategy.load_weights(held.tensors["model"])
    strategy.load_optimizer_tensors(held.tensors["optimizer"])
    step(model, optimizer, 2)
    step(again, again_optimizer, 2)
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped byte in the weights": lambda path: flip_a_byte(path / "model.safetensors"),
    "flipped byte in the optimizer": lambda path: flip_a_byte(path / "optimizer.safetensors"),
    "truncated": lambda path: (path / "model.safetensors").write_bytes(b"short"),
    "state missing": lambda path: (path / "state.json").unlink(),
    "state changed": lambda path: (path / "state.json").write_text("{}"),
    "manifest missing": lambda path: (path / "MANIFEST.json").unlink(),
    "manifest is no JSON": lambda path: (path / "MANIFEST.json").write_text("{"),
    "manifest is a list": lambda path: (path / "MANIFEST.json").write_text("[1]"),
    "manifest entry of another form": lambda path: (path / "MANIFEST.json").write_text(
        json.dumps({p.name: 3 for p in path.iterdir() if p.name != "MANIFEST.json"})
    ),
    "a file more": lambda path: (path / "extra.safetensors").write_bytes(b""),
    "empty": lambda path: [p.unlink() for p in path.iterdir()],
    "manifest without end": lambda path: (path / "MANIFEST.json").write_text("[" * 2**18),
    "manifest of another place": lambda path: (path / "MANIFEST.json").write_text(
        (path / "MANIFEST.json").read_text().replace("state.json", "../state.json")
    ),
    "a link": lambda path: (
        (path / "state.json").rename(path.parent / "state.json")
        and (path / "state.json").symlink_to("../state.json")
    ),
    "a pipe": lambda path: (path / "state.json").unlink() or os.mkfifo(path / "state.json"),
    "a folder": lambda path: (path / "state.json").unlink() or (path / "state.json").mkdir(),
    "a file of that name": lambda path: shutil.rmtree(path) or path.write_text("a file"),
    "a dangling link of that name": lambda path: shutil.rmtree(path) or path.symlink_to("nothing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_taken(
    damage: str, tmp_path: Path
) -> None:
    """A damaged checkpoint would be loaded, be deleted, or block the resume from the one before."""
    checkpoint.save(tmp_path, 10, example(1.0))
    checkpoint.save(tmp_path, 20, example(2.0))
    DAMAGE[damage](tmp_path / "step-00000020")
    said, report = complaints()
    found = checkpoint.newest(tmp_path, report)  # type: ignore[arg-type]
    assert found == tmp_path / "step-00000010"
    assert len(said) == 1 and "step-00000020" in said[0]
    assert os.path.lexists(tmp_path / "bad-step-00000020"), "never deleted silently"
    assert checkpoint.steps(tmp_path) == [10]


def test_junk_is_ignored_and_nothing_found_is_none(tmp_path: Path) -> None:
    """A stray folder would block a resume, or unfinished checkpoints would fill the disk."""
    said, report = complaints()
    assert checkpoint.newest(tmp_path / "not there", report) is None  # type: ignore[arg-type]
    (tmp_path / "step-x").mkdir()
    (tmp_path / ".step-00000009.123").mkdir()
    (tmp_path / "bad-step-00000007").mkdir()
    assert checkpoint.newest(tmp_path, report) is None  # type: ignore[arg-type]
    assert not said
    assert not (tmp_path / ".step-00000009.123").exists(), "what a killed process was writing"


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed save, half a checkpoint would take up room on a disk that is full already."""
    checkpoint.save(tmp_path, 1, example())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, example())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """A step that is saved again would keep its old weights, or take the room of two."""
    checkpoint.save(tmp_path, 1, example(1.0))
    path = checkpoint.save(tmp_path, 1, example(2.0))
    assert float(checkpoint.load(path).tensors["model"]["w"][0, 0]) == 2.0
    assert checkpoint.steps(tmp_path) == [1]
    checkpoint.prune(tmp_path, keep=set())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("damaged", [False, True])
def test_one_that_was_being_replaced_counts_until_there_is_another(
    damaged: bool, tmp_path: Path
) -> None:
    """A kill while a checkpoint is being replaced would cost the user that checkpoint."""
    checkpoint.save(tmp_path, 1, example(1.0))
    path = checkpoint.save(tmp_path, 2, example(2.0))
    path.rename(tmp_path / "replaced-step-00000002")  # and the process was killed
    if damaged:
        path.mkdir()
    assert [one.name for one in checkpoint.candidates(tmp_path)][damaged] == f"replaced-{path.name}"
    said, report = complaints()
    assert checkpoint.newest(tmp_path, report) == path  # type: ignore[arg-type]
    assert len(said) == damaged and checkpoint.damage(path) is None


def test_retention_keeps_the_newest_and_those_named(tmp_path: Path) -> None:
    """Old checkpoints would fill the disk, or the best one and those of --keep-every be deleted."""
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, step, example())
    (tmp_path / ".step-00000006.99").mkdir()
    checkpoint.prune(tmp_path, keep={2, None})
    assert checkpoint.steps(tmp_path) == [2, 4, 5]
    assert not (tmp_path / ".step-00000006.99").exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_tensors_in_any_memory_format(tmp_path: Path) -> None:
    """A network in channels_last could not be saved, or would come back permuted."""
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    path = checkpoint.save(tmp_path, 1, Checkpoint({"model": {"w": weight}}, {}))
    assert torch.equal(checkpoint.load(path).tensors["model"]["w"], weight)


def test_no_code_is_executed(tmp_path: Path) -> None:
    """A checkpoint from someone else could execute code on the user's machine.

    A pickle where a safetensors file should be is refused even with a matching manifest.
    """
    path = checkpoint.save(tmp_path, 1, example())
    torch.save({"w": torch.ones(1)}, path / "model.safetensors")
    shutil.copy(path / "MANIFEST.json", tmp_path / "old.json")
    manifest = json.loads((path / "MANIFEST.json").read_text())
    file = path / "model.safetensors"
    manifest[file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint._sha256(file)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert checkpoint.damage(path) is None
    with pytest.raises(InputError, match=r"model.safetensors: no safetensors .*(?i:header)"):
        checkpoint.load(path)


@pytest.mark.parametrize("state", ["3", "{", "[]", "[" * 10**6])
def test_a_state_that_is_none_is_refused_in_one_line(state: str, tmp_path: Path) -> None:
    """A broken state.json would end in a traceback that names neither the file nor a remedy."""
    path = checkpoint.save(tmp_path, 1, example())
    (path / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"state\.json: not a JSON object: move"):
        checkpoint.load_state(path)


@pytest.mark.parametrize(
    "progress", [None, 3, {"step": "x"}, {"step": 0.5}, {"step": 3, "more": 1}]
)
def test_progress_of_another_form_is_refused_in_one_line(progress: object) -> None:
    """A checkpoint of another version would end in a traceback or resume at a wrong step."""
    with pytest.raises(InputError, match=r"state\.json of another version: ") as refused:
        read_progress({"progress": progress})
    assert "\n" not in str(refused.value)
