"""Metrics that merge: a total and a weight, never a mean of means."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A weighted mean, exact over microbatches, hosts and padding.

    Attributes:
        total: weighted sum.
        weight: sum of weights.
    """

    total: jax.Array
    weight: jax.Array

    def merge(self, other: "Mean") -> "Mean":
        """Returns the mean over both."""
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> jax.Array:
        """Returns total / weight, 0 where nothing was counted."""
        return self.total / jnp.maximum(self.weight, 1)
