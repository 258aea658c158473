"""Small images and what they show, which scikit-learn carries: nothing to download.

`digits`: 1,797 digits that 43 people wrote (Alpaydin and Kaynak, 1998), of 8 × 8 pixels
in 17 greys, each with its name, such as "seven"; about a tenth is held out. Importing
this file imports TensorFlow; making them needs the extra `quality`.
"""

from collections.abc import Callable, Iterator

import numpy as np

from tasks.factories import add_documents
from tasks.python_text import is_held_out
from tasks.quality.packages import quality_packages
from tasks.sources import Document

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_HELD_OUT = 0.1


def _documents(*, held_out: bool) -> Callable[[], Iterator[Document]]:
    def documents() -> Iterator[Document]:
        with quality_packages("making the digits of tasks.digits"):
            from sklearn.datasets import load_digits

        found = load_digits()
        # From 0 to 16 there, and to 255 here.
        pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
        for number, (image, digit) in enumerate(
            zip(pixels, found.target.tolist(), strict=True)
        ):
            name = f"digits/{number}"
            if is_held_out(name, _HELD_OUT) == held_out:
                features = {"images": image.tobytes(), "targets": NAMES[digit].encode()}
                yield Document(features, name)

    return documents


add_documents(
    "digits",
    {"train": _documents(held_out=False), "validation": _documents(held_out=True)},
    features=("images", "targets"),
)
