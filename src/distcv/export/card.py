"""The model card: what the network is, how it was trained, how well it does, how it is used.

In the form of the Hugging Face hub: a README.md headed by YAML
(https://huggingface.co/docs/hub/model-cards). The license is left to whoever publishes it.
"""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from distcv.export.formats import TOLERANCE, Checked
from distcv.models import build_model
from distcv.results import read_rows, read_run, read_starts
from distcv.summary import layer_table
from distcv.trained import TrainedNetwork, Which

TITLES = {"onnx": "ONNX", "torch-export": "torch.export", "safetensors": "safetensors"}
HUB = {  # the data sets' names on the hub
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
}
PROGRAM = {
    "onnx": """\
import numpy
images = numpy.zeros((1, {shape}), numpy.uint8)  # yours: (N, C, H, W), from 0 to 255

import onnxruntime
session = onnxruntime.InferenceSession("{file}")
(logits,) = session.run(["logits"], {{"images": images}})
""",
    "torch-export": """\
import torch
images = torch.zeros(1, {shape}, dtype=torch.uint8)  # yours: (N, C, H, W), from 0 to 255

program = torch.export.load("{file}").module()
logits = program(images)
""",
    "safetensors": """\
import torch
images = torch.zeros(1, {shape}, dtype=torch.uint8)  # yours: (N, C, H, W), from 0 to 255

from distcv.models import build_model
from safetensors.torch import load_file
network = build_model("{model}", channels={channels}, classes={classes}).eval()
network.load_state_dict(load_file("{file}"))
mean, std = (255 * torch.tensor(v).view(-1, 1, 1) for v in ({mean}, {std}))
logits = network((images - mean) / std)
""",
}
INPUTS = {
    "onnx": "The input `images` is raw pixels, the output `logits` one row an image; the "
    "normalization is inside, N is free. The names of the classes are among the file's metadata.",
    "torch-export": "The input is raw pixels, the output one row of logits an image; the "
    "normalization is inside, N is free. `about.json` inside of the file names the classes.",
    "safetensors": "The file holds the weights by their names in distcv's network, and in its "
    "header the normalization and the names of the classes.",
}


def model_card(trained: TrainedNetwork, to: str, which: Which, file: Path, checked: Checked) -> str:
    """The text of README.md."""
    recipe, evaluated = trained.recipe, evaluation(trained)
    head = yaml.safe_dump(_metadata(trained, to, evaluated), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{head}---\n\n# {recipe.model} on {recipe.dataset}, {TITLES[to]}",
        _what_it_is(trained, which),
        "## Accuracy\n\n" + _accuracy(trained, which, evaluated),
        f"## Use\n\n{_code('python', _program(trained, to, file.name))}\n\n{INPUTS[to]}",
        f"Checked against the network in torch {_plain_version()}: {checked.describe()}. More than "
        f"{TOLERANCE:g} of the largest would have been refused.",
        "## Training\n\nThe recipe, which `python -m distcv.train --recipe FILE` repeats:\n\n"
        + _code("yaml", recipe.to_yaml()),
        _environment(trained),
        "## Limits\n\n" + _limits(trained),
        "## Layers\n\n" + _code("", _layers(trained)),
    ]
    return "\n\n".join(sections) + "\n"


def evaluation(trained: TrainedNetwork) -> dict[str, Any] | None:
    """The row of metrics.jsonl that was measured with this checkpoint; None if there is none."""
    rows = (row for row in read_rows(trained.folder) if row["event"] == "epoch")
    return next((row for row in rows if row["step"] == trained.step), None)


def _metadata(trained: TrainedNetwork, to: str, evaluated: dict[str, Any] | None) -> dict[str, Any]:
    recipe = trained.recipe
    head: dict[str, Any] = {
        "library_name": "onnx" if to == "onnx" else "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["distcv", recipe.model, to],
    }
    if recipe.dataset in HUB:
        head["datasets"] = [HUB[recipe.dataset]]
    head["metrics"] = ["accuracy"]
    if evaluated:
        accuracy = {
            "type": "accuracy",
            "name": "accuracy, without test-time augmentation",
            "value": round(evaluated["test_accuracy"] / 100, 6),
        }
        result = {
            "task": {"type": "image-classification", "name": "Image Classification"},
            "dataset": {
                "type": HUB.get(recipe.dataset, recipe.dataset),
                "name": recipe.dataset,
                "split": "test",
            },
            "metrics": [accuracy],
        }
        head["model-index"] = [{"name": recipe.model, "results": [result]}]
    return head


def _what_it_is(trained: TrainedNetwork, which: Which) -> str:
    recipe, info = trained.recipe, trained.info
    channels, height, width = info.shape
    layers = sum(isinstance(part, (nn.Conv2d, nn.Linear)) for part in trained.network.modules())
    parameters = sum(weight.numel() for weight in trained.network.parameters())
    kind = {1: "gray", 3: "RGB"}.get(channels, f"{channels}-channel")
    weights = ", as their moving average" if recipe.ema_decay else ""
    return (
        f"`{recipe.model}` classifies {kind} images of {height}×{width} pixels: "
        f"{parameters:,} parameters, {layers} convolutions and linear layers. It was trained on "
        f"{recipe.dataset} by distcv; the weights are those of step {trained.step:,} (the run's "
        f"{which} checkpoint){weights}.\n\n"
        f"The {len(info.classes)} classes, in the order of the logits: {', '.join(info.classes)}."
    )


def _accuracy(trained: TrainedNetwork, which: Which, evaluated: dict[str, Any] | None) -> str:
    if evaluated is None:
        return "These weights were not evaluated: the run was stopped within an epoch."
    recipe = trained.recipe
    text = (
        f"{evaluated['test_accuracy']:.2f} % of the {trained.info.test:,} test images, with a loss "
        f"of {evaluated['test_loss']:.4f}: one run (n = 1, seed {recipe.seed}), after "
        f"{evaluated['epoch']:g} of {recipe.epochs} epochs, without test-time augmentation."
    )
    if which == "best":
        text += " That epoch was chosen for its accuracy on these very images, which flatters it."
    if recipe.precision != "fp32":
        text += f" It was measured in {recipe.precision}; this file computes in fp32."
    result = read_run(trained.folder).result
    if result is None or result.get("steps") != trained.step:
        return text
    rows = [f"| {name} | {share:.2f} |" for name, share in result["class_accuracy"].items()]
    return "\n".join([text, "", "| class | accuracy (%) |", "|---|---:|", *rows])


def _program(trained: TrainedNetwork, to: str, file: str) -> str:
    info = trained.info
    return PROGRAM[to].format(
        file=file,
        shape=", ".join(map(str, info.shape)),
        model=trained.recipe.model,
        channels=info.shape[0],
        classes=len(info.classes),
        mean=list(info.mean),
        std=list(info.std),
    )


def _environment(trained: TrainedNetwork) -> str:
    starts = read_starts(trained.folder)
    if not starts:
        return "Of the environment there is no record."
    start = starts[-1]
    facts = {
        "commit": start.get("commit"),
        "distcv": start.get("distcv"),
        "Python": start.get("python"),
        "torch": start.get("versions", {}).get("torch"),
        "device": start.get("device"),
        "processor": start.get("cpu"),
        "processes": start.get("processes"),
        "nodes": start.get("nodes"),
        "strategy": start.get("strategy"),
        "recipe's SHA-256": trained.recipe.sha256,
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def _limits(trained: TrainedNetwork) -> str:
    return (
        f"It gives one of its classes for any image, also for one of something else. It was "
        f"measured on {trained.recipe.dataset} alone: on images of another origin, size or "
        "framing, expect less. Its probabilities were not calibrated, and one run says nothing of "
        "the spread between seeds."
    )


def _layers(trained: TrainedNetwork) -> str:
    with torch.device("meta"):
        network = build_model(
            trained.recipe.model,
            channels=trained.info.shape[0],
            classes=len(trained.info.classes),
        )
    return layer_table(network, (1, *trained.info.shape))


def _plain_version() -> str:
    return str(torch.__version__).split("+")[0]


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
