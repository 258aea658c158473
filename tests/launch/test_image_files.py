"""Image files before prompts: what a model gets of them, and what is refused."""

import numpy as np
import pytest
from memory_store import settings
from PIL import Image

from launch.evaluation import images

pytestmark = pytest.mark.fast


def data(size: int, channels: int):
    return settings(
        "captions",
        task_feature_lengths={"targets": 30},
        image_size=size,
        patch_size=2,
        image_channels=channels,
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_come_row_by_row_with_their_channels(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, channels), np.uint8)
    Image.fromarray(pixels.squeeze()).save(tmp_path / "image.png")
    found = images.read(str(tmp_path / "image.png"), data(6, channels))
    assert found.dtype == np.uint8
    assert found.tolist() == pixels.reshape(-1).tolist()


def test_other_sizes_and_colours_are_made_to_fit(tmp_path):
    Image.new("RGB", (40, 10), (255, 255, 255)).save(tmp_path / "wide.jpg")
    assert images.read(str(tmp_path / "wide.jpg"), data(6, 1)).tolist() == [255] * 36


@pytest.mark.parametrize(
    ("size", "channels", "said"),
    [
        (0, 3, r"the model has no images \(IMAGE_SIZE = 0\)"),
        (6, 2, "the model has IMAGE_CHANNELS = 2"),
        (6, 3, "text.png cannot be read: cannot identify image file"),
    ],
)
def test_what_cannot_be_given_is_said(tmp_path, size, channels, said):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(images.ImageError, match=said):
        images.read(str(tmp_path / "text.png"), data(size, channels))


def test_a_file_that_is_not_there_or_damaged_is_said(tmp_path):
    Image.new("RGB", (6, 6)).save(tmp_path / "damaged.png")
    content = bytearray((tmp_path / "damaged.png").read_bytes())
    content[content.index(b"IDAT") + 8] ^= 255
    (tmp_path / "damaged.png").write_bytes(content)
    for name in ("missing.png", "damaged.png", "a\0.png"):
        with pytest.raises(images.ImageError, match="cannot be read"):
            images.read(str(tmp_path / name), data(6, 3))
