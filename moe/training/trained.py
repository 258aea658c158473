"""Which parameters are trained, by their names, and which stay as they are.

A tree of what is trained has None in place of all others, where jax sees nothing: so
gradients, clipping and the optimizer's state are of what is trained, and of no more.
"""

import difflib
import fnmatch
import math
from collections.abc import Collection, Sequence
from typing import Any

import jax

from moe.settings import OptimizerSettings


def is_trained(name: str, settings: OptimizerSettings) -> bool:
    """Whether a parameter is trained.

    Args:
        name: path, such as "decoder/layers/0/0/sparse/router".
        settings: patterns of what is trained, and of what is not.
    """
    chosen = not settings.trainable or any(
        matches(name, pattern) for pattern in settings.trainable
    )
    return chosen and not any(matches(name, pattern) for pattern in settings.frozen)


def trained_of(tree: Any, settings: OptimizerSettings) -> Any:
    """Returns the tree of parameters, or of what stands for them, without the frozen.

    Args:
        tree: parameters, in the structure of `inventory.specs`.
        settings: patterns; without any it is the tree itself.
    """
    if not (settings.trainable or settings.frozen):
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if is_trained(_name(path), settings) else None, tree
    )


def joined(trained: Any, whole: Any) -> Any:
    """Returns the whole tree, with what is trained in the place of what was there."""
    return jax.tree.map(
        lambda new, old: old if new is None else new,
        trained,
        whole,
        is_leaf=lambda leaf: leaf is None,
    )


def problems(specs: Any, settings: OptimizerSettings) -> list[str]:
    """Lists patterns that match no parameter, and says if none would be trained.

    Args:
        specs: all parameters.
        settings: patterns.
    """
    names = [_name(path) for path, _ in jax.tree.leaves_with_path(specs)]
    given = {"TRAINABLE": settings.trainable, "FROZEN": settings.frozen}
    found = []
    for macro, patterns in given.items():
        found += unmatched(macro, patterns, names)
    if not found and not any(is_trained(name, settings) for name in names):
        found.append(
            f"TRAINABLE = {settings.trainable} and FROZEN = {settings.frozen} leave "
            "nothing to train"
        )
    return found


def counted(specs: Any, settings: OptimizerSettings) -> tuple[int, int]:
    """Returns how many parameters are trained, and how many there are."""
    sizes = {
        _name(path): math.prod(spec.shape)
        for path, spec in jax.tree.leaves_with_path(specs)
    }
    of_trained = (size for name, size in sizes.items() if is_trained(name, settings))
    return sum(of_trained), sum(sizes.values())


def unmatched(
    macro: str, patterns: Sequence[str], names: Collection[str], where: str = ""
) -> list[str]:
    """Says of each pattern that matches no name which names are the nearest.

    Args:
        macro: knob that has the patterns.
        patterns: its value.
        names: all parameters.
        where: words that say which parameters they are, such as " of runs/mine".
    """
    found = []
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            found.append(
                f"{macro} = {patterns}: {pattern!r} matches no parameter{where}; the "
                f"nearest are {', '.join(near)}"
            )
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of a shell matches a name, as it is or as a checkpoint's."""
    return any(fnmatch.fnmatchcase(n, pattern) for n in (name, f"params/{name}"))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
