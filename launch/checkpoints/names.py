"""Arrays of a tree by their names, as checkpoints keep them."""

from collections.abc import Mapping
from typing import Any

import jax


def named_arrays(tree: Any) -> dict[str, Any]:
    """Flattens a tree into arrays by path, such as "params/embedding"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }


def unnamed(arrays: Mapping[str, Any], like: Any) -> Any:
    """Puts named arrays back into a tree."""
    ordered = [arrays[name] for name in named_arrays(like)]
    return jax.tree.unflatten(jax.tree.structure(like), ordered)
