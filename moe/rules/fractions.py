"""What a probability may be."""


def fraction_problems(fractions: dict[str, float]) -> list[str]:
    """Lists the macros whose values are not in [0, 1)."""
    return [
        f"{macro} = {x}: must be in [0, 1)"
        for macro, x in fractions.items()
        if not 0 <= x < 1
    ]
