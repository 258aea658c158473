"""Parameters and floating-point operations, counted from the model's own shapes."""

import dataclasses
import math
from fractions import Fraction

import jax

from moe.model import transformer
from moe.settings import ModelSettings, RouterSettings, capacity
from moe.training.optimizer import num_stacked
from partitioning import rules


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of a model.

    Attributes:
        total: parameters.
        active: parameters that one token meets: all, but of the experts only those
            that it chooses, or that choose it on average.
        embedding: of them, in the input embedding.
        forward_flops_per_token: 2 per active parameter in a matrix product, and
            attention's 4·N·D·L per layer as if nothing were masked
            (arXiv:2204.02311, appendix B).
        executed_forward_flops_per_token: the same with the empty slots that transports
            of fixed capacity make the experts compute.
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
        router: choices per token and the capacity.
        length: L, for the cost of attention.
    """
    shapes = jax.eval_shape(
        lambda: transformer.init_params(jax.random.key(0), model, router)
    )
    total = experts = expert_products = products = embedding = 0
    for path, array, axes in rules.leaves(
        shapes, transformer.param_axes(model, router)
    ):
        size = math.prod(array.shape)
        is_matrix = array.ndim - num_stacked(axes) >= 2
        total += size
        if "expert" in axes:
            experts += size
            expert_products += size if is_matrix else 0
        elif path == "embedding":
            embedding = size
            products += size if model.tie_embeddings else 0
        elif is_matrix:
            products += size
    E = max(model.num_experts, 1)
    chosen = router.mean_choices(E) / E
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * length
    slots = Fraction(capacity(router, E, train=True), router.group_size)
    return Counts(
        total=total,
        active=total - experts + int(experts * chosen),
        embedding=embedding,
        forward_flops_per_token=2 * (products + int(expert_products * chosen))
        + attention,
        executed_forward_flops_per_token=2 * (products + int(expert_products * slots))
        + attention,
    )
