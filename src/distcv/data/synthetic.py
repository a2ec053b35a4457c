"""A data set made in memory, for tests, demonstrations and machines without a network.

An image is the pattern of its class, a mosaic of dark and bright tiles, moved around its own edges
by any number of pixels and covered with noise. In every channel of every class as many tiles are
dark as bright, so that only how they lie tells the classes apart: a linear network stays near
chance, a small convolutional one passes 90 % within a few epochs. A test holds the set to both.
"""

import numpy as np

from distcv.data import DatasetInfo
from distcv.data.readers import Arrays

_KEY = 20
_TILES = 4  # a pattern is 4x4 tiles, whatever the size of the image
_CONTRAST = 32  # of the tiles about mid-grey; the noise has a standard deviation of 52
_CHUNK = 500  # images made at once, which bounds the int16 intermediates


def make_arrays(info: DatasetInfo) -> Arrays:
    """Make the images of `info.shape`; the same bytes on every machine, in every process.

    Only raw 64-bit words of the counter-based generator are used, and integer arithmetic: numpy
    promises those to stay the same over its versions, and its distributions not (NEP 19).
    """
    words = np.random.Philox(key=_KEY)

    def random_bytes(*shape: int) -> np.ndarray:
        count = int(np.prod(shape))
        raw = np.atleast_1d(words.random_raw(-(-count // 8))).astype("<u8")
        return raw.view(np.uint8)[:count].reshape(shape).astype(np.int16)

    channels, height, width = info.shape
    area = _TILES * _TILES
    order = np.argsort(random_bytes(len(info.classes), channels, area), axis=-1, kind="stable")
    tiles = np.where(order < area // 2, 128 - _CONTRAST, 128 + _CONTRAST)
    tiles = tiles.reshape(-1, channels, _TILES, _TILES).astype(np.int16)
    rows, columns = np.arange(height), np.arange(width)
    patterns = tiles[:, :, rows * _TILES // height][..., columns * _TILES // width]

    count = info.train + info.test
    labels = np.arange(count, dtype=np.int64) % len(info.classes)
    images = np.empty((count, *info.shape), dtype=np.uint8)
    channel = np.arange(channels)[None, :, None, None]
    for start in range(0, count, _CHUNK):
        label = labels[start : start + _CHUNK, None, None, None]
        size = len(label)
        down, right = random_bytes(size, 1) % height, random_bytes(size, 1) % width
        row = ((rows + down) % height)[:, None, :, None]
        column = ((columns + right) % width)[:, None, None, :]
        noise = random_bytes(size, *info.shape) + random_bytes(size, *info.shape) - 255
        shifted = patterns[label, channel, row, column]
        images[start : start + size] = np.clip(shifted + noise // 2, 0, 255)

    small = labels.astype(np.uint8)
    train = info.train
    return Arrays(images[:train], small[:train], images[train:], small[train:])
