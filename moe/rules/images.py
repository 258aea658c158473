"""Rules of images before text. Standard library only."""

from moe.settings import ModelSettings


def image_problems(model: ModelSettings, length: int, hashed: str) -> list[str]:
    """Lists what is wrong with images and patches.

    Args:
        model: sizes and shape.
        length: L, tokens of a row.
        hashed: knob by which a router looks at the ids of tokens, which patches have
            not; "" where none does.
    """
    size, patch, channels = model.image_size, model.patch_size, model.image_channels
    default = ModelSettings(1, 1, 1, 1, 1, 1)
    if size < 0:
        return [f"IMAGE_SIZE = {size}: 0 has no images"]
    if not size:
        return [
            f"{macro} = {value} means nothing to IMAGE_SIZE = 0: leave it at {unused}"
            for macro, value, unused in (
                ("PATCH_SIZE", patch, default.patch_size),
                ("IMAGE_CHANNELS", channels, default.image_channels),
            )
            if value != unused
        ]
    found = []
    if patch < 1 or size % patch:
        found.append(
            f"PATCH_SIZE = {patch} does not divide IMAGE_SIZE = {size}: an image is "
            "cut into whole patches"
        )
    elif (patches := (size // patch) ** 2) >= length:
        found.append(
            f"TASK_FEATURE_LENGTHS: a row of {length} tokens has no room for text "
            f"after the {patches} patches of IMAGE_SIZE = {size} and PATCH_SIZE = "
            f"{patch}: make it longer, or PATCH_SIZE larger"
        )
    if channels < 1:
        found.append(f"IMAGE_CHANNELS = {channels}: a pixel has 1 number at least")
    if model.shape != "decoder":
        found.append(
            f"IMAGE_SIZE = {size} means nothing to ARCHITECTURE = {model.shape!r}: "
            "images stand before the text of a decoder; set it to 0"
        )
    if hashed:
        found.append(
            f"{hashed} goes by the ids of tokens, and the patches of IMAGE_SIZE = "
            f"{size} have none: choose another"
        )
    return found
