"""Every network against its document: sizes, layer tables, and what the builders promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import distcv
from distcv.config import InputError
from distcv.models import MODELS, build_model
from distcv.models.dropout import Dropout
from distcv.runtime.device import use_channels_last

PARAMS = {
    "tiny_v1": 24_986,
    "tiny_v2": 7_538,
    "tiny_v3": 7_316,
    "plain": 593_200,
    "skeleton": 194_884,
    "lighter": 20_954,
    "batchnorm": 14_390,
    "dropout": 14_390,
    "gap": 9_490,
    "wide": 6_379_786,
    "compact": 12_854,
    "gap_9k": 9_180,
    "gap_8k": 7_616,
    "vgg8": 1_822_250,
    "resnet18": 11_173_962,
}

DROPOUT_LAYERS = {
    "tiny_v1": 7,
    "tiny_v2": 6,
    "tiny_v3": 6,
    "dropout": 7,
    "gap": 7,
    "compact": 3,
    "gap_9k": 5,
    "gap_8k": 2,
    "vgg8": 4,
    "resnet18": 19,
}

# Documents 001, 002 and 004, row by row: type, output shape without the batch, parameters.
LAYER_TABLES = {
    "plain": """
        Conv2d 32x26x26 320
        Conv2d 64x24x24 18496
        Conv2d 128x10x10 73856
        Conv2d 256x8x8 295168
        Linear 50 204850
        Linear 10 510
    """,
    "skeleton": """
        Conv2d 32x26x26 288, ReLU 32x26x26 0
        Conv2d 64x24x24 18432, ReLU 64x24x24 0
        Conv2d 128x22x22 73728, ReLU 128x22x22 0
        MaxPool2d 128x11x11 0
        Conv2d 32x11x11 4096, ReLU 32x11x11 0
        Conv2d 64x9x9 18432, ReLU 64x9x9 0
        Conv2d 128x7x7 73728, ReLU 128x7x7 0
        Conv2d 10x7x7 1280, ReLU 10x7x7 0
        Conv2d 10x1x1 4900
    """,
    "lighter": """
        Conv2d 10x26x26 90, ReLU 10x26x26 0
        Conv2d 16x24x24 1440, ReLU 16x24x24 0
        Conv2d 16x22x22 2304, ReLU 16x22x22 0
        MaxPool2d 16x11x11 0
        Conv2d 16x11x11 256, ReLU 16x11x11 0
        Conv2d 24x9x9 3456, ReLU 24x9x9 0
        Conv2d 24x7x7 5184, ReLU 24x7x7 0
        Conv2d 16x7x7 384, ReLU 16x7x7 0
        Conv2d 10x1x1 7840
    """,
    "gap": """
        Conv2d 10x26x26 90, ReLU 10x26x26 0, BatchNorm2d 10x26x26 20, Dropout 10x26x26 0
        Conv2d 10x24x24 900, ReLU 10x24x24 0, BatchNorm2d 10x24x24 20, Dropout 10x24x24 0
        Conv2d 10x22x22 900, ReLU 10x22x22 0, BatchNorm2d 10x22x22 20, Dropout 10x22x22 0
        MaxPool2d 10x11x11 0
        Conv2d 16x11x11 160, ReLU 16x11x11 0, BatchNorm2d 16x11x11 32, Dropout 16x11x11 0
        Conv2d 16x9x9 2304, ReLU 16x9x9 0, BatchNorm2d 16x9x9 32, Dropout 16x9x9 0
        Conv2d 32x7x7 4608, ReLU 32x7x7 0, BatchNorm2d 32x7x7 64, Dropout 32x7x7 0
        Conv2d 10x7x7 320, ReLU 10x7x7 0, BatchNorm2d 10x7x7 20, Dropout 10x7x7 0
        AvgPool2d 10x1x1 0
    """,
    "wide": """
        Conv2d 32x28x28 320
        Conv2d 64x28x28 18496
        MaxPool2d 64x14x14 0
        Conv2d 128x14x14 73856
        Conv2d 256x14x14 295168
        MaxPool2d 256x7x7 0
        Conv2d 512x5x5 1180160
        Conv2d 1024x3x3 4719616
        Conv2d 10x1x1 92170
    """,
    "compact": """
        Conv2d 10x26x26 90, ReLU 10x26x26 0, BatchNorm2d 10x26x26 20, Dropout 10x26x26 0
        Conv2d 32x24x24 2880, ReLU 32x24x24 0, BatchNorm2d 32x24x24 64, Dropout 32x24x24 0
        Conv2d 10x22x22 2880, ReLU 10x22x22 0, BatchNorm2d 10x22x22 20, Dropout 10x22x22 0
        MaxPool2d 10x11x11 0
        Conv2d 10x11x11 100, ReLU 10x11x11 0
        Conv2d 10x9x9 900, ReLU 10x9x9 0
        Conv2d 10x7x7 900, ReLU 10x7x7 0
        Conv2d 10x7x7 100, ReLU 10x7x7 0
        Conv2d 10x1x1 4900
    """,
    "gap_9k": """
        Conv2d 12x26x26 108, ReLU 12x26x26 0, BatchNorm2d 12x26x26 24, Dropout 12x26x26 0
        Conv2d 16x24x24 1728, ReLU 16x24x24 0, BatchNorm2d 16x24x24 32, Dropout 16x24x24 0
        Conv2d 12x22x22 1728, ReLU 12x22x22 0, BatchNorm2d 12x22x22 24, Dropout 12x22x22 0
        MaxPool2d 12x11x11 0
        Conv2d 16x9x9 1728, ReLU 16x9x9 0, BatchNorm2d 16x9x9 32, Dropout 16x9x9 0
        Conv2d 16x7x7 2304, ReLU 16x7x7 0, BatchNorm2d 16x7x7 32, Dropout 16x7x7 0
        Conv2d 10x5x5 1440
        AvgPool2d 10x1x1 0
    """,
    "gap_8k": """
        Conv2d 8x26x26 72, ReLU 8x26x26 0, BatchNorm2d 8x26x26 16
        Conv2d 16x24x24 1152, ReLU 16x24x24 0, BatchNorm2d 16x24x24 32
        Conv2d 16x24x24 256
        Conv2d 16x22x22 2304, ReLU 16x22x22 0, BatchNorm2d 16x22x22 32, Dropout 16x22x22 0
        MaxPool2d 16x11x11 0
        Conv2d 12x9x9 1728, ReLU 12x9x9 0, BatchNorm2d 12x9x9 24
        Conv2d 10x7x7 1080, ReLU 10x7x7 0, BatchNorm2d 10x7x7 20, Dropout 10x7x7 0
        Conv2d 10x5x5 900
        AvgPool2d 10x1x1 0
    """,
    "resnet18": """
        Conv2d 64x32x32 1728, BatchNorm2d 64x32x32 128
        Conv2d 64x32x32 36864, BatchNorm2d 64x32x32 128, Dropout 64x32x32 0
        Conv2d 64x32x32 36864, BatchNorm2d 64x32x32 128, Dropout 64x32x32 0
        BasicBlock 64x32x32 0
        Conv2d 64x32x32 36864, BatchNorm2d 64x32x32 128, Dropout 64x32x32 0
        Conv2d 64x32x32 36864, BatchNorm2d 64x32x32 128, Dropout 64x32x32 0
        BasicBlock 64x32x32 0
        Conv2d 128x16x16 73728, BatchNorm2d 128x16x16 256, Dropout 128x16x16 0
        Conv2d 128x16x16 147456, BatchNorm2d 128x16x16 256, Dropout 128x16x16 0
        Conv2d 128x16x16 8192, BatchNorm2d 128x16x16 256, Dropout 128x16x16 0
        BasicBlock 128x16x16 0
        Conv2d 128x16x16 147456, BatchNorm2d 128x16x16 256, Dropout 128x16x16 0
        Conv2d 128x16x16 147456, BatchNorm2d 128x16x16 256, Dropout 128x16x16 0
        BasicBlock 128x16x16 0
        Conv2d 256x8x8 294912, BatchNorm2d 256x8x8 512, Dropout 256x8x8 0
        Conv2d 256x8x8 589824, BatchNorm2d 256x8x8 512, Dropout 256x8x8 0
        Conv2d 256x8x8 32768, BatchNorm2d 256x8x8 512, Dropout 256x8x8 0
        BasicBlock 256x8x8 0
        Conv2d 256x8x8 589824, BatchNorm2d 256x8x8 512, Dropout 256x8x8 0
        Conv2d 256x8x8 589824, BatchNorm2d 256x8x8 512, Dropout 256x8x8 0
        BasicBlock 256x8x8 0
        Conv2d 512x4x4 1179648, BatchNorm2d 512x4x4 1024, Dropout 512x4x4 0
        Conv2d 512x4x4 2359296, BatchNorm2d 512x4x4 1024, Dropout 512x4x4 0
        Conv2d 512x4x4 131072, BatchNorm2d 512x4x4 1024, Dropout 512x4x4 0
        BasicBlock 512x4x4 0
        Conv2d 512x4x4 2359296, BatchNorm2d 512x4x4 1024, Dropout 512x4x4 0
        Conv2d 512x4x4 2359296, BatchNorm2d 512x4x4 1024, Dropout 512x4x4 0
        BasicBlock 512x4x4 0
        Linear 10 5130
    """,
}

CONV_NORM_RELU = ["Conv2d", "BatchNorm2d", "ReLU"]


def home_shape(name: str) -> tuple[int, int, int]:
    return (1, 28, 28) if MODELS[name].dataset == "mnist" else (3, 32, 32)


def home_model(name: str, dropout: float = 0.0) -> nn.Module:
    return build_model(name, channels=home_shape(name)[0], classes=10, dropout=dropout)


def modules_as_they_run(model: nn.Module, images: Tensor) -> list[tuple[str, str, int]]:
    """(type, output shape without the batch, own parameters) of each module, as it finishes."""
    rows = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        params = sum(p.numel() for p in module.parameters(recurse=False))
        rows.append((type(module).__name__, "x".join(map(str, output.shape[1:])), params))

    for module in model.modules():
        module.register_forward_hook(record)
    model(images)
    return rows


def types_in_order(name: str) -> list[str]:
    return [
        row[0] for row in modules_as_they_run(home_model(name), torch.zeros(2, *home_shape(name)))
    ]


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(distcv.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=300
    )


def test_table_holds_these_networks() -> None:
    """A network that users train by name would be missing or listed with a wrong size."""
    assert {name: model.params for name, model in MODELS.items()} == PARAMS


@pytest.mark.parametrize("name", PARAMS)
def test_parameter_count(name: str) -> None:
    """Users would train a network of another size than its document reports."""
    assert sum(p.numel() for p in home_model(name).parameters()) == PARAMS[name]


@pytest.mark.parametrize("name", LAYER_TABLES)
def test_layer_table_of_the_document(name: str) -> None:
    """A network would differ from its document, whose accuracy users could then not reproduce."""
    lines = LAYER_TABLES[name].strip().splitlines()
    expected = []
    for row in ", ".join(lines).split(","):
        kind, shape, params = row.split()
        expected.append((kind, shape, int(params)))
    model = home_model(name, dropout=0.1 if name == "resnet18" else 0.0)
    listed = {row[0] for row in expected}
    ran = [
        (kind.replace("AdaptiveAvgPool2d", "AvgPool2d"), shape, params)
        for kind, shape, params in modules_as_they_run(model, torch.zeros(2, *home_shape(name)))
    ]
    assert [row for row in ran if row[0] in listed] == expected


@pytest.mark.parametrize("name", ["plain", "wide"])
def test_every_hidden_layer_without_a_row_for_it_has_a_relu(name: str) -> None:
    """Two layers of `plain` or `wide` would form one linear map and cost accuracy."""
    types = types_in_order(name)
    weighted = [i for i, kind in enumerate(types) if kind in ("Conv2d", "Linear")]
    assert all(types[i + 1] == "ReLU" for i in weighted[:-1])
    assert "ReLU" not in types[weighted[-1] :]


def test_pools_of_plain_follow_the_second_and_fourth_convolution() -> None:
    """`plain` would pool elsewhere than in its document and could reach another accuracy."""
    types = [kind for kind in types_in_order("plain") if kind in ("Conv2d", "MaxPool2d")]
    assert types == ["Conv2d", "Conv2d", "MaxPool2d"] * 2


@pytest.mark.parametrize(
    ("name", "before_pool", "head"),
    [
        ("tiny_v1", 4, ["AdaptiveAvgPool2d", "Flatten", "Linear"]),
        ("tiny_v2", 3, ["AdaptiveAvgPool2d", "Conv2d", "Flatten"]),
        ("tiny_v3", 3, ["AdaptiveAvgPool2d", "Conv2d", "Flatten"]),
    ],
)
def test_order_of_layers_in_tiny(name: str, before_pool: int, head: list[str]) -> None:
    """Saved weights of a `tiny` network would not load, or would give other predictions."""
    types = [kind for kind in types_in_order(name) if kind not in ("Dropout", "Sequential")]
    assert types == CONV_NORM_RELU * before_pool + ["MaxPool2d"] + CONV_NORM_RELU * 3 + head


def test_order_of_layers_in_vgg8() -> None:
    """`vgg8` would have another order of layers than its document and lose its accuracy."""
    types = [kind for kind in types_in_order("vgg8") if kind != "Sequential"]
    pair = [*CONV_NORM_RELU, *CONV_NORM_RELU, "Dropout", "MaxPool2d"]
    assert types == pair * 4 + ["Flatten", "Linear", "ReLU", "Linear"]


@pytest.mark.parametrize("name", PARAMS)
def test_logits_for_other_channels_and_classes(name: str) -> None:
    """Users could not train a network on data of 3 channels or 100 classes."""
    _, height, width = home_shape(name)
    for channels, classes in [(1, 10), (3, 100)]:
        model = build_model(name, channels=channels, classes=classes)
        assert model(torch.randn(2, channels, height, width)).shape == (2, classes)


@pytest.mark.parametrize("name", sorted(PARAMS.keys() - {"plain", "vgg8"}))
def test_logits_for_other_image_sizes(name: str) -> None:
    """Users could not train a network on images larger than those of its own data set."""
    channels, _, _ = home_shape(name)
    assert home_model(name)(torch.randn(2, channels, 40, 36)).shape == (2, 10)


@pytest.mark.parametrize("name", PARAMS)
def test_gradient_reaches_every_parameter(name: str) -> None:
    """Some weights would keep their initial values, and users would not notice."""
    torch.manual_seed(0)
    model = home_model(name)
    loss = nn.functional.cross_entropy(model(torch.randn(8, *home_shape(name))), torch.arange(8))
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
    assert dict(zip(parameters, reached, strict=True)) == dict.fromkeys(parameters, True)


@pytest.mark.parametrize("name", PARAMS)
def test_dropout_is_where_the_document_has_it_and_refused_elsewhere(name: str) -> None:
    """`--dropout` would miss layers, or have no effect on a network without dropout layers."""
    if name not in DROPOUT_LAYERS:
        with pytest.raises(
            InputError, match=rf"dropout = 0\.3, but model '{name}'.*set dropout to 0"
        ):
            home_model(name, dropout=0.3)
        return
    model = home_model(name, dropout=0.3)
    rates = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.3] * DROPOUT_LAYERS[name]
    # Weights trained with dropout must load into the network without it.
    assert model.state_dict().keys() == home_model(name).state_dict().keys()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range(dropout: float) -> None:
    """A dropout of 1 would give users a network that learns nothing."""
    with pytest.raises(InputError, match="outside"):
        home_model("gap", dropout=dropout)


def test_unknown_model_names_the_nearest() -> None:
    """Users who mistype a model's name would not be shown the right one."""
    with pytest.raises(InputError, match="unknown model 'resnet_18': did you mean 'resnet18'"):
        build_model("resnet_18", channels=3, classes=10)


@pytest.mark.slow
def test_summary_of_resnet18() -> None:
    """The summary would show users wrong layers, MACs or memory sizes of `resnet18`."""
    result = run_python("-m", "distcv.summary", "--model", "resnet18", "--dropout", "0.1")
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines.count("Conv2d [1, 512, 4, 4] 2,359,296") == 3
    assert sum(line.startswith("Dropout") for line in lines) == 19
    # Sizes as document 004 prints them.
    assert lines[-8:] == [
        "Parameters: 11,173,962",
        "Trainable parameters: 11,173,962",
        "Non-trainable parameters: 0",
        "Forward MACs per image: 555.4 M",
        "Input size: 0.01 MB",
        "Forward/backward size: 15.44 MB",
        "Parameters size: 42.63 MB",
        "Total size: 58.07 MB",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet_18"], "did you mean 'resnet18'"),
        (["--model", "plain", "--dropout", "0.1"], "model 'plain' has no dropout layers"),
        (["--model", "gap", "--dropout", "2"], "dropout"),
        (["--model", "gap", "--batch-size", "0"], "batch"),
    ],
)
def test_summary_refuses_in_one_line(arguments: list[str], message: str) -> None:
    """A wrong flag of `distcv.summary` would print a traceback or part of a table."""
    result = run_python("-m", "distcv.summary", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize(("name", "wide"), [("resnet18", True), ("vgg8", True), ("gap", False)])
@pytest.mark.parametrize("weights", [True, False])
def test_maps_are_channels_last_where_that_pays(name: str, wide: bool, weights: bool) -> None:
    """`resnet18` and `vgg8`, or narrow networks such as `gap`, would train slower on a CPU.

    This holds also where the weights may not be channels_last, as under FSDP2 and ZeRO.
    """
    maps = []
    network = build_model(name, channels=3 if wide else 1, classes=10)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.out_channels > 1:
            module.register_forward_hook(lambda module, inputs, out: maps.append(out))
    use_channels_last(network, torch.device("cpu"), weights=weights)
    images = torch.randn(2, 3 if wide else 1, 32 if wide else 28, 32 if wide else 28)
    network(images)
    large = [m for m in maps if m.shape[2] > 1]
    assert [m.is_contiguous(memory_format=torch.channels_last) for m in large] == [
        wide for _ in large
    ]
    last = next(w for w in network.parameters() if w.ndim == 4 and w.shape[2] > 1)
    assert last.is_contiguous() == (not wide or not weights)


def test_dropout_of_nearly_everything_still_keeps_something() -> None:
    """A dropout very close to 1 would divide by zero and turn the loss into NaN."""
    torch.manual_seed(0)
    out = Dropout(0.999999)(torch.ones(1000, 1000))
    assert set(out.unique().tolist()) == {0.0, 65536.0} and int(out.count_nonzero()) < 50


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_each_activation_by_itself(
    p: float, memory_format: torch.memory_format
) -> None:
    """Dropout on a CPU would drop another share than asked for, or ignore the seed."""
    ones = torch.ones(50, 7, 31, 29).to(memory_format=memory_format).requires_grad_()
    torch.manual_seed(0)
    out = Dropout(p)(ones)
    dropped = (out == 0).double()
    deviation = (p * (1 - p) / ones.numel()) ** 0.5
    assert abs(dropped.mean() - p) < 4 * deviation
    neighbours = ((dropped[..., 1:] - p) * (dropped[..., :-1] - p)).mean() / (p * (1 - p))
    assert abs(neighbours) < 4 / ones.numel() ** 0.5, "independent of each other"
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)), rtol=1e-4)
    out.sum().backward()
    assert ones.grad is not None and torch.equal(ones.grad, out.detach()), "the same mask"
    again = Dropout(p)
    torch.manual_seed(0)
    assert torch.equal(again(ones), out), "the seed decides"
    assert torch.equal(again.eval()(ones), ones)
