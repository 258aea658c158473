"""Parameters and floating-point operations, counted from the model's own shapes."""

import dataclasses
import math

import jax

from moe.model import transformer
from moe.settings import ModelSettings, RouterSettings, capacity
from partitioning import rules


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of a model.

    Attributes:
        total: parameters.
        active: parameters that one token meets: all, but K of E experts.
        embedding: of them, in the input embedding.
        forward_flops_per_token: 2 per active parameter in a matrix product, and
            attention's 4·N·D·L per layer as if nothing were masked
            (arXiv:2204.02311, appendix B).
        executed_forward_flops_per_token: the same with the empty slots that capacity
            makes the experts compute.
    """

    total: int
    active: int
    embedding: int
    forward_flops_per_token: int
    executed_forward_flops_per_token: int

    @property
    def train_flops_per_token(self) -> int:
        """Forward and backward: three times the forward pass."""
        return 3 * self.forward_flops_per_token


def count(model: ModelSettings, router: RouterSettings, length: int) -> Counts:
    """Counts a model without allocating it.

    Args:
        model: sizes.
        router: K and the capacity.
        length: L, for the cost of attention.
    """
    shapes = jax.eval_shape(lambda: transformer.init_params(jax.random.key(0), model))
    total = experts = products = embedding = 0
    for path, array, axes in rules.leaves(shapes, transformer.param_axes(model)):
        size = math.prod(array.shape)
        total += size
        if "expert" in axes:
            experts += size
        elif path == "embedding":
            embedding = size
            products += size if model.tie_embeddings else 0
        elif array.ndim >= 2 and not path.endswith("norm"):
            products += size
    K, E = router.num_selected, max(model.num_experts, 1)
    active_experts = experts * K // E
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * length
    rows = E * capacity(router, E, train=True) / (K * router.group_size)
    return Counts(
        total=total,
        active=total - experts + active_experts,
        embedding=embedding,
        forward_flops_per_token=2 * (products + active_experts) + attention,
        executed_forward_flops_per_token=2 * (products + int(active_experts * rows))
        + attention,
    )
