"""Image files as a model is given them."""

import numpy as np

from launch.errors import UserError
from tasks.settings import DataSettings

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels


class ImageError(UserError):
    """A file that cannot stand before a prompt."""


def read(path: str, data: DataSettings) -> np.ndarray:
    """Reads an image file of any kind that Pillow knows, scaled to IMAGE_SIZE.

    Both sides are scaled to it, whatever they were to one another.

    Args:
        path: name of the file.
        data: sizes of the model's images.
    Returns:
        uint8[N], pixels row by row, each with its channels.
    Raises:
        ImageError: the model has no images, or of other channels than files have; or
            the file is none.
    """
    from PIL import Image

    if not data.image_size:
        raise ImageError("--image: the model has no images (IMAGE_SIZE = 0)")
    if data.image_channels not in _MODES:
        raise ImageError(
            f"--image: files have 1, 3 or 4 numbers in a pixel, and the model has "
            f"IMAGE_CHANNELS = {data.image_channels}"
        )
    try:
        with Image.open(path) as image:
            whole = image.convert(_MODES[data.image_channels])
    except (
        *(OSError, SyntaxError, ValueError, EOFError),
        Image.DecompressionBombError,
    ) as error:
        raise ImageError(f"--image={path} cannot be read: {error}") from None
    size = (data.image_size, data.image_size)
    return np.asarray(whole.resize(size), np.uint8).reshape(-1)
