"""The table of data sets, the real data it describes, and the synthetic set."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distcv.config import InputError
from distcv.data import DATASETS, find_dataset, load_dataset
from support.data_files import MNIST, MNIST_HEADERS, child_environment

MNIST_SUMS = [  # of the published files, header included
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
]
CIFAR10_SUMS = [
    "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
    "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
    "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
]

# Another sum here changes every result measured on the synthetic set.
SYNTHETIC_SUM = "f1e9d356f0a10534fcc2acd839be81f62bdbb225cc6e29898cfd36569a86b0d6"


# The table and the real data


def test_reading_the_table_imports_nothing_heavy() -> None:
    """Users would wait for torch and numpy to load before a misspelt data set is refused."""
    code = (
        "import sys, distcv.data; print({'torch', 'numpy', 'PIL', 'filelock'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize(
    ("name", "sums", "headers"),
    [("mnist", MNIST_SUMS, MNIST_HEADERS), ("cifar10", CIFAR10_SUMS, [b""] * 4)],
)
def test_real_data(name: str, sums: list[str], headers: list[bytes], data_dir: Path) -> None:
    """Users would train on pixels or labels that are not those of MNIST or CIFAR-10."""
    data = load_dataset(name, data_dir)
    info = data.info
    assert data.train_images.shape == (info.train, *info.shape)
    assert data.test_images.shape == (info.test, *info.shape)
    assert data.train_images.dtype == data.test_images.dtype == torch.uint8
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    for labels, count in [(data.train_labels, info.train), (data.test_labels, info.test)]:
        assert labels.shape == (count,)
        assert labels.unique().tolist() == list(range(len(info.classes))) == list(range(10))
    parts = [data.train_images, data.train_labels, data.test_images, data.test_labels]
    for part, expected, header in zip(parts, sums, headers, strict=True):
        assert hashlib.sha256(header + part.byte().numpy().tobytes()).hexdigest() == expected


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_mean_and_std_are_those_of_the_training_images(name: str, data_dir: Path) -> None:
    """Inputs would not have mean 0 and deviation 1, and published accuracies could be missed."""
    if name in ("fashion_mnist", "cifar100") and not (data_dir / f"distcv/{name}.uint8").exists():
        pytest.skip(f"{name} has not been fetched into {data_dir}")
    data = load_dataset(name, data_dir)
    for channel, (mean, std) in enumerate(zip(data.info.mean, data.info.std, strict=True)):
        # From the histogram, so that no copy in float64 is needed.
        counts = torch.bincount(data.train_images[:, channel].flatten(), minlength=256).double()
        values, weights = torch.arange(256) / 255, counts / counts.sum()
        found = float((weights * values).sum())
        assert found == pytest.approx(mean, abs=1e-6)
        assert float((weights * (values - found) ** 2).sum().sqrt()) == pytest.approx(std, abs=1e-6)


def test_class_names() -> None:
    """Predictions and reports would give users the wrong class names."""
    from torchvision import datasets

    assert list(DATASETS["fashion_mnist"].classes) == datasets.FashionMNIST.classes
    assert [name[0] for name in datasets.MNIST.classes] == list(MNIST.classes)
    assert DATASETS["cifar10"].classes[3:7] == ("cat", "deer", "dog", "frog")
    fine = DATASETS["cifar100"].classes
    assert len(set(fine)) == 100 and list(fine) == sorted(fine)
    assert (fine[0], fine[23], fine[52], fine[99]) == ("apple", "cloud", "oak_tree", "worm")


def test_every_row_is_whole() -> None:
    """A data set would be normalised by values that do not match its channels or pixels."""
    for name, row in DATASETS.items():
        assert row.name == name
        assert len(row.mean) == len(row.std) == row.shape[0]
        assert all(0 < value < 1 for value in (*row.mean, *row.std))


def test_unknown_name_and_wrong_shape_are_refused(tmp_path: Path) -> None:
    """A misspelt data set would get no hint, and a wrong image shape no explanation."""
    with pytest.raises(InputError, match="did you mean 'cifar10'"):
        find_dataset("cifar-10")
    with pytest.raises(InputError, match=r"\(3, 32, 32\): mnist has \(1, 28, 28\)"):
        load_dataset("mnist", tmp_path, shape=(3, 32, 32))
    with pytest.raises(InputError, match="at least 1"):
        load_dataset("synthetic", tmp_path, shape=(3, 0, 32))
    assert not list(tmp_path.iterdir())


# The synthetic set


def test_synthetic_is_the_same_everywhere(tmp_path: Path) -> None:
    """Results on the synthetic set could not be compared between machines or versions."""
    data = load_dataset("synthetic", tmp_path / "none")
    assert data.train_images.shape == (10_000, 3, 32, 32) and data.test_images.shape[0] == 2_000
    digest = hashlib.sha256(data.train_images.numpy())
    digest.update(data.test_images.numpy())
    assert digest.hexdigest() == SYNTHETIC_SUM
    assert data.test_labels.bincount().tolist() == [200] * 10
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 9, 14)])
def test_synthetic_shape_decides(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Synthetic images of a user's own shape would be wrong or wrongly normalised."""
    data = load_dataset("synthetic", tmp_path, shape=shape)
    assert data.info.shape == shape == data.train_images.shape[1:] == data.test_images.shape[1:]
    assert len(data.info.mean) == len(data.info.std) == shape[0]
    exact = 2e-4 if shape[1] % 4 == 0 else 0.02  # tiles of one size, or of several
    pixels = data.train_images.double() / 255
    assert pixels.mean((0, 2, 3)).tolist() == pytest.approx(data.info.mean, abs=exact)
    assert pixels.std((0, 2, 3)).tolist() == pytest.approx(data.info.std, abs=exact)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_synthetic_is_learnt_by_a_convolutional_network_only(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    """The synthetic set could not show users whether their convolutional network learns."""
    data = load_dataset("synthetic", tmp_path, shape=shape)
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    convolutional = nn.Sequential(
        *(nn.Conv2d(shape[0], 16, 4, stride=4), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3), nn.ReLU()),
        *(nn.Flatten(), nn.LazyLinear(10)),
    )

    def accuracy_after_four_epochs(model: nn.Module) -> float:
        def logits(images: torch.Tensor) -> torch.Tensor:
            return model(images.float() / 64 - 2)

        logits(data.train_images[:1])  # gives the lazy layer its weights
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for ids in torch.cat([torch.randperm(10_000) for _ in range(4)]).split(100):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                logits(data.train_images[ids]), data.train_labels[ids]
            )
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = logits(data.test_images).argmax(1) == data.test_labels
        return float(right.double().mean())

    assert accuracy_after_four_epochs(linear) < 0.25
    assert accuracy_after_four_epochs(convolutional) > 0.92
