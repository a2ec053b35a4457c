"""Augmentation: what each operation does, and that chance is f(seed, epoch, id)."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import TrivialAugmentWide, _apply_op

from distcv.augment import AUGMENTS, Augmenter, Chance, affine, flip, translate
from distcv.config import InputError, Recipe, load_recipe
from distcv.data import DATASETS, ImageData
from distcv.data import __main__ as data_command
from distcv.data.loading import Batch, ResidentImages
from distcv.samples import sample_picture
from distcv.trivial_augment import OPERATIONS

IDS = torch.arange(64)
EVERYTHING = {
    "translate": 3, "translate_mode": "reflect", "flip": "random", "rotate": 15.0, "scale": 0.1,
    "shear": 5.0, "trivial_augment": True, "cutout": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> ResidentImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ResidentImages(images, torch.arange(256) % 10, torch.device("cpu"))


def augmenter(data: ResidentImages, **fields: object) -> Augmenter:
    return Augmenter(Recipe(dataset="cifar10", **fields), data, DATASETS["cifar10"])  # type: ignore[arg-type]


def chance(epoch: int = 0, ids: Tensor = IDS) -> Chance:
    return Chance(0, epoch, ids, ids)


def test_nothing_is_shifted_away_or_blanked_as_a_whole(data: ResidentImages) -> None:
    """A `--translate` or `--cutout` that is too large would train on blank images unnoticed."""
    augmenter(data, translate=31, cutout=63)
    for fields in ({"translate": 32}, {"translate": 10**30}, {"cutout": 64}):
        ((name, size),) = fields.items()
        with pytest.raises(InputError, match=f"^{name} {size} leaves nothing of images"):
            augmenter(data, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_a_sample_s_chance_does_not_depend_on_its_neighbours(
    data: ResidentImages, mixing: dict[str, float]
) -> None:
    """The same run on more devices would see other images and reach other weights."""
    augment = augmenter(data, **EVERYTHING, **mixing)
    ids = torch.tensor([5, 200, 17, 33, 90, 91])
    inputs, targets = augment(data.__getitems__(ids), 3)
    for part in (ids[:2], ids[2:]):
        places = torch.isin(ids, part)
        again, same_targets = augment(data.__getitems__(part), 3)
        assert torch.equal(inputs[places], again)
        assert torch.equal(targets[places], same_targets)
    other_epoch, _ = augment(data.__getitems__(ids), 4)
    assert not torch.equal(inputs, other_epoch)
    other_seed, _ = augmenter(data, seed=1, **EVERYTHING, **mixing)(data.__getitems__(ids), 3)
    assert not torch.equal(inputs, other_seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(AUGMENTS))
def test_each_operation_alone_changes_images_and_keeps_their_form(
    name: str, data: ResidentImages
) -> None:
    """An augmentation flag would do nothing, change labels or overwrite the training set."""
    fields = {"affine": {"rotate": 15.0}, "translate": {"translate": 3}, "flip": {"flip": "random"},
              "trivial_augment": {"trivial_augment": True}}[name]  # fmt: skip
    augment = augmenter(data, **fields)
    assert len(augment.operations) == 1
    batch = data.__getitems__(IDS)
    plain, _ = augmenter(data)(batch, 0)
    changed, labels = augment(batch, 0)
    assert changed.shape == plain.shape and changed.dtype == torch.float32
    assert torch.equal(labels, batch.labels)
    assert not torch.equal(changed, plain)
    assert torch.equal(batch.images, data.images[IDS]), "the data itself is left alone"


def test_normalised_as_the_table_says(data: ResidentImages) -> None:
    """Networks would get images that are not normalised by the data set's mean and deviation."""
    inputs, _ = augmenter(data)(data.__getitems__(IDS), 0)
    info = DATASETS["cifar10"]
    mean, std = torch.tensor(info.mean).view(3, 1, 1), torch.tensor(info.std).view(3, 1, 1)
    expected = (data.images[IDS].float() / 255 - mean) / std
    torch.testing.assert_close(inputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_translate_shifts_by_every_amount_and_fills_the_border(mode: str) -> None:
    """`--translate` would leave out some shifts, or fill the border with other pixels."""
    ids = torch.arange(4000)
    images = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4] = 200
    recipe = Recipe(translate=2, translate_mode=mode)  # type: ignore[arg-type]
    moved = translate(images, recipe, chance(ids=ids))
    places = moved.flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=81).view(9, 9)
    assert int(counts[2:7, 2:7].sum()) == 4000
    assert int(counts[2:7, 2:7].min()) > 100, "all 25 shifts, about 160 times each"
    ramp = torch.arange(9, dtype=torch.uint8).view(1, 1, 1, 9).expand(4000, 1, 9, 9) + 1
    shifted = translate(ramp, recipe, chance(ids=ids))[:, 0, 0]
    right_by_two = shifted[(shifted[:, 2:7] == torch.arange(1, 6)).all(1)]
    border = {"zero": [0, 0], "reflect": [3, 2]}[mode]
    rows = {tuple(row[:2].tolist()) for row in right_by_two}
    assert tuple(border) in rows and len(rows) <= 2  # a shift up or down may uncover zeros too


def test_random_flip_mirrors_half_and_alternating_flip_every_second_epoch(
    data: ResidentImages,
) -> None:
    """`--flip alternating` would show some images unchanged in two epochs in a row."""
    images, mirrored = data.images[:64], data.images[:64].flip(-1)

    def which(recipe: Recipe, epoch: int) -> Tensor:
        out = flip(images, recipe, chance(epoch))
        is_mirror = (out == mirrored).flatten(1).all(1)
        assert torch.equal(~is_mirror, (out == images).flatten(1).all(1))
        return is_mirror

    alternating = [which(Recipe(flip="alternating"), epoch) for epoch in range(4)]
    assert 16 < int(alternating[0].sum()) < 48
    assert torch.equal(alternating[0], ~alternating[1])
    assert torch.equal(alternating[0], alternating[2])
    by_chance = [which(Recipe(flip="random"), epoch) for epoch in range(4)]
    assert not torch.equal(by_chance[0], by_chance[2])
    assert 96 < int(torch.stack(by_chance).sum()) < 160


def test_rotation_turns_about_the_centre_within_its_limit() -> None:
    """`--rotate 30` would turn images too far, too little or not about their centre."""
    images = torch.zeros(64, 1, 31, 31)
    images[:, :, 2, 15] = 255.0  # a point above the centre
    turned = affine(images, Recipe(rotate=30.0), chance())
    weight = turned / turned.sum((1, 2, 3), keepdim=True)
    y, x = torch.meshgrid(torch.arange(31) - 15.0, torch.arange(31) - 15.0, indexing="ij")
    angle = torch.rad2deg(torch.atan2((weight * x).sum((1, 2, 3)), -(weight * y).sum((1, 2, 3))))
    assert float(angle.abs().max()) <= 31 and float(angle.min()) < -15 and float(angle.max()) > 15


def test_cutout_blanks_a_square_with_the_mean_colour(data: ResidentImages) -> None:
    """`--cutout 6` would blank another area than a square, or give it another colour."""
    inputs, _ = augmenter(data, cutout=6)(data.__getitems__(IDS), 0)
    plain, _ = augmenter(data)(data.__getitems__(IDS), 0)
    changed = (inputs != plain).any(1)
    assert torch.equal(inputs[changed.unsqueeze(1).expand_as(inputs)].unique(), torch.zeros(1))
    assert int(changed.sum((1, 2)).max()) == 36
    assert int(changed.sum((1, 2)).min()) >= 9, "at least a quarter lies inside"


def test_mixup_blends_images_and_labels_alike(data: ResidentImages) -> None:
    """MixUp would train on labels whose weights differ from those of the blended images."""
    augment = augmenter(data, mixup=1.0)
    batch = data.__getitems__(IDS)
    inputs, targets = augment(batch, 0)
    assert targets.shape == (64, 10)
    torch.testing.assert_close(targets.sum(1), torch.ones(64))
    weights = np.random.default_rng([0, 0]).beta(1.0, 1.0, 256).astype(np.float32)[:64]
    partners = chance().on_host().integers("partner", 0, 255)
    own, other = augment.normalize(batch.images), augment.normalize(data.images[partners])
    w = torch.from_numpy(weights).view(-1, 1, 1, 1)
    torch.testing.assert_close(inputs, w * own + (1 - w) * other, rtol=1e-5, atol=1e-5)
    same = data.labels[partners] == batch.labels
    torch.testing.assert_close(
        targets[~same].gather(1, batch.labels[~same].unsqueeze(1)).squeeze(1), w.flatten()[~same]
    )


def test_cutmix_s_labels_are_the_areas(data: ResidentImages) -> None:
    """CutMix would train on labels that do not match how much of each image is visible."""
    inputs, targets = augmenter(data, cutmix=1.0)(data.__getitems__(IDS), 0)
    plain, labels = augmenter(data)(data.__getitems__(IDS), 0)
    own = (inputs == plain).all(1).float().mean((1, 2))
    partners = chance().on_host().integers("partner", 0, 255)
    differ = data.labels[partners] != labels
    given = targets.gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(given[differ], own[differ], rtol=0, atol=2e-3)
    assert 0.2 < float(own.mean()) < 0.8


def test_trivial_augment_uses_all_operations(data: ResidentImages) -> None:
    """TrivialAugment would be weaker than published: some operations would not be drawn."""
    drawn = chance(ids=torch.arange(3000)).integers("ta-op", 0, len(OPERATIONS) - 1)
    assert len(OPERATIONS) == 14
    assert int(torch.bincount(drawn).min()) > 130
    image = data.images[:1]
    outputs = [operation(image, 0.8) for operation in OPERATIONS]
    assert all(o.dtype == torch.uint8 and o.shape == image.shape for o in outputs)
    assert torch.equal(outputs[0], image)
    changed = [i for i, o in enumerate(outputs) if not torch.equal(o, image)]
    assert len(changed) >= 12, "noise is left alone by contrast stretching at most"


# With an even and an odd side, a rotation by 90 degrees samples midway between pixels, where the
# rounding of the processor decides.
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 1, 28, 28), (1, 3, 20, 34)])
def test_the_operations_of_trivial_augment_are_torchvision_s(shape: tuple[int, ...]) -> None:
    """Users could not compare accuracies with papers that use torchvision's TrivialAugment."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    space = TrivialAugmentWide()._augmentation_space(31)
    for (name, (magnitudes, signed)), operation in zip(space.items(), OPERATIONS, strict=True):
        for strength in torch.arange(-30, 31).tolist():
            magnitude = float(magnitudes[abs(strength)]) if magnitudes.ndim else 0.0
            if "Translate" in name:  # there 16 pixels are 15, since 32 bits give 15.999999
                magnitude = 32 * abs(strength) / 30
            magnitude *= -1 if signed and strength < 0 else 1
            expected = _apply_op(images, name, magnitude, InterpolationMode.NEAREST, None)
            difference = (operation(images, strength / 30).int() - expected.int()).abs()
            # The colours are computed in another order, and end at a whole number.
            moved = name in ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
            assert int(difference.max()) <= (0 if moved else 1), (name, strength)


def image_data(name: str) -> ImageData:
    """Noise in the place of a data set's images, two of each class."""
    info = DATASETS[name]
    labels = torch.arange(2 * len(info.classes)) % len(info.classes)
    images = torch.randint(0, 256, (len(labels), *info.shape), dtype=torch.uint8)
    return ImageData(images, labels, images, labels, info)


def test_the_picture_of_samples_has_each_class_raw_and_augmented() -> None:
    """Users would judge a recipe by a picture that lacks classes or shows no augmentation."""
    data = image_data("cifar100")
    picture = sample_picture(data, load_recipe("resnet18"), rows=3)
    tiles = picture[:, 2:, 2:].unfold(1, 32, 34).unfold(2, 32, 34).permute(1, 2, 0, 3, 4)
    assert tiles.shape == (40, 10, 3, 32, 32)
    assert torch.equal(tiles[::4].flatten(0, 1), data.train_images[:100])
    for row in (1, 2, 3):
        changed = (tiles[row::4] != tiles[::4]).flatten(2).any(2)
        assert bool(changed.all()), "flipped, shifted and with a square cut out"


def test_the_picture_of_a_number_of_classes_that_fill_no_row_ends_in_gray() -> None:
    """For a data set of 15 classes, the picture of samples would fail or show wrong tiles."""
    data = image_data("cifar100")
    info = dataclasses.replace(data.info, classes=data.info.classes[:15])
    picture = sample_picture(dataclasses.replace(data, info=info), load_recipe("resnet18"), rows=1)
    assert picture.shape == (3, 4 * 34 + 2, 10 * 34 + 2)
    last = picture[:, 2 * 34 :]
    assert bool((last[:, :, 5 * 34 + 2 :] == 128).all())
    assert torch.equal(last[:, 2:34, 4 * 34 + 2 : 5 * 34], data.train_images[14])


@pytest.mark.parametrize("name", DATASETS)
def test_the_augmentation_that_is_shown_changes_the_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`distcv.data --show` would present copies of the raw images as augmented samples."""
    monkeypatch.setattr(data_command, "load_dataset", lambda *_: image_data(name))
    file = tmp_path / "samples.png"
    monkeypatch.setattr(sys, "argv", ["data", "--dataset", name, "--show", str(file)])
    data_command.main()
    recipe = "gap" if "mnist" in name else "resnet18"
    assert capsys.readouterr().out.endswith(f"samples as recipe {recipe} augments them: {file}\n")
    side = DATASETS[name].shape[1] + 2
    picture = np.asarray(Image.open(file))
    assert not np.array_equal(picture[2:side], picture[side + 2 : 2 * side])


def test_grey_images_pass_through_everything() -> None:
    """Some augmentation would fail on gray images, or turn them into NaN."""
    images = torch.randint(0, 256, (64, 1, 28, 28), dtype=torch.uint8)
    data = ResidentImages(images, torch.arange(64) % 10, torch.device("cpu"))
    augment = Augmenter(Recipe(**EVERYTHING), data, DATASETS["mnist"])  # type: ignore[arg-type]
    inputs, _ = augment(data.__getitems__(IDS), 0)
    assert inputs.shape == (64, 1, 28, 28) and bool(inputs.isfinite().all())


def test_integers_reach_both_ends_and_nothing_else() -> None:
    """The largest shifts would never be drawn, or more often than the others."""
    many = chance(ids=torch.arange(200_000)).integers("x", -3, 4)
    assert torch.bincount(many + 3).tolist() == pytest.approx([25_000] * 8, rel=0.05)


def test_streams_differ() -> None:
    """Images would be shifted along one diagonal only, as far down as to the right."""
    one, two = chance()("translate-x"), chance()("translate-y")
    assert not torch.equal(one, two)


def test_batch_is_a_plain_tuple() -> None:
    """Code that builds or unpacks a batch by position would mix up images, labels and ids."""
    assert Batch._fields == ("images", "labels", "ids", "host_ids")
