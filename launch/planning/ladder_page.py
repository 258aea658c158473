"""docs/ladder.md, made from the results of `launch.planning.ladder`."""


def write() -> None:
    """Writes the page."""
