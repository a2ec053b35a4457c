"""The formats: how each is made, and how it is read back and run.

They are made in memory: what writes a file by itself tells of a full disk in a way of its own.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distcv import __version__
from distcv.config import InputError
from distcv.models import build_model
from distcv.results import read_starts
from distcv.trained import TrainedNetwork

TOLERANCE = 1e-4  # of the largest logit; fp32 in another order of summation

Logits = Callable[[Tensor], Tensor]
"""From raw images, uint8 (N, C, H, W), to logits (N, K)."""


class Program(nn.Module):
    """From raw images, uint8 (N, C, H, W), to logits (N, K): the normalization and the network."""

    def __init__(self, trained: TrainedNetwork) -> None:
        super().__init__()
        self.network = trained.network
        self.mean = nn.Buffer(trained.normalize.mean)
        self.inverse = nn.Buffer(trained.normalize.inverse)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.to(torch.float32) - self.mean) * self.inverse)
        return logits


@dataclass(frozen=True)
class Checked:
    """What the comparison of a file with the network that it came from has shown."""

    samples: int
    difference: float
    """The largest difference of a logit."""
    scale: float
    """The largest logit."""

    def describe(self) -> str:
        return (
            f"on {self.samples} test images, one at a time and together, its predictions are the "
            f"network's and its logits differ by at most {self.difference:.1e} (the largest is "
            f"{self.scale:.3g})"
        )


@torch.no_grad()
def check(trained: TrainedNetwork, run: Logits, images: Tensor) -> Checked:
    """Run a file on test images, one by one and all at once.

    Raises:
        InputError: a logit differs by more than ``TOLERANCE`` of the largest one, or a prediction.
    """
    expected = trained.logits(images)
    single = torch.cat([run(image[None]) for image in images])
    found = torch.stack([run(images), single])
    difference, scale = float((found - expected).abs().max()), float(expected.abs().max())
    changed = int((found.argmax(-1) != expected.argmax(-1)).sum())
    if changed or not difference <= TOLERANCE * scale:  # NaN, too
        raise InputError(
            f"the exported network is not that of {trained.checkpoint}: its logits differ by up to "
            f"{difference:.1e} of {scale:.3g} and {changed} of {found[..., 0].numel()} predictions "
            "do: nothing was written; try another --to, and report it"
        )
    return Checked(len(images), difference, scale)


def properties(trained: TrainedNetwork) -> dict[str, str]:
    """What is told about the network inside of the file; lists are in JSON."""
    starts = read_starts(trained.folder)
    return {
        "model": trained.recipe.model,
        "dataset": trained.recipe.dataset,
        "classes": json.dumps(trained.info.classes),
        "mean": json.dumps(trained.info.mean),
        "std": json.dumps(trained.info.std),
        "normalization": "(images / 255 - mean) / std, a channel",
        "step": str(trained.step),
        "config_sha256": trained.recipe.sha256,
        "commit": str(starts[-1].get("commit")) if starts else "unknown",
        "distcv": __version__,
    }


def make_safetensors(trained: TrainedNetwork, about: dict[str, str]) -> bytes:
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in trained.network.state_dict().items()}
    return save(weights, metadata=about | {"format": "pt"})


def read_safetensors(path: Path, trained: TrainedNetwork) -> Logits:
    from safetensors.torch import load_file

    info = trained.info
    network = build_model(trained.recipe.model, channels=info.shape[0], classes=len(info.classes))
    network.load_state_dict(load_file(path))
    network.eval()
    return lambda images: network(trained.normalize(images))


def make_torch_export(trained: TrainedNetwork, about: dict[str, str]) -> bytes:
    file = io.BytesIO()
    with _quiet():
        torch.export.save(_exported(trained), file, extra_files={"about.json": json.dumps(about)})
    return file.getvalue()


def read_torch_export(path: Path, trained: TrainedNetwork) -> Logits:
    with _quiet():
        module = torch.export.load(path).module()
    return lambda images: module(images)


def make_onnx(trained: TrainedNetwork, about: dict[str, str]) -> bytes:
    import onnx

    with _quiet():
        program = torch.onnx.export(
            _exported(trained),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: "batch"}},  # the axis' name; the shape is the program's
        )
    assert program is not None, "without a file name, the program is returned"
    model = program.model_proto
    # The exporter says of every part where it is from, with the paths of this machine.
    graph = model.graph
    functions = [part for function in model.functions for part in (function, *function.node)]
    parts = [graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *functions]
    for part in [model, *parts, *graph.initializer]:
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.helper.set_model_props(model, about)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def read_onnx(path: Path, trained: TrainedNetwork) -> Logits:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _exported(trained: TrainedNetwork) -> torch.export.ExportedProgram:
    """The program as a graph for any number of images, without the paths of this machine."""
    example = torch.zeros(2, *trained.info.shape, dtype=torch.uint8)
    exported = torch.export.export(
        Program(trained).eval(),
        (example,),
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)
    return exported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, which are for their authors: what they write is checked."""
    with warnings.catch_warnings(action="ignore"):
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


MAKE: dict[str, Callable[[TrainedNetwork, dict[str, str]], bytes]] = {
    "onnx": make_onnx,
    "torch-export": make_torch_export,
    "safetensors": make_safetensors,
}
READ: dict[str, Callable[[Path, TrainedNetwork], Logits]] = {
    "onnx": read_onnx,
    "torch-export": read_torch_export,
    "safetensors": read_safetensors,
}
