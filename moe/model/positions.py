"""Where tokens stand: rotary angles, and T5's bias by bucket of distance."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.parameters import scaled
from moe.settings import ModelSettings


def rotate(x_BLND: jax.Array, position_BL: jax.Array, base: float) -> jax.Array:
    """Turns (d, d + D/2) by position · base^(-2d/D) (arXiv:2104.09864, eq. 34)."""
    half = x_BLND.shape[-1] // 2
    rate = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BLd = position_BL[..., None].astype(jnp.float32) * rate
    cos_BL1d, sin_BL1d = jnp.cos(angle_BLd)[:, :, None], jnp.sin(angle_BLd)[:, :, None]
    left, right = jnp.split(x_BLND.astype(jnp.float32), 2, axis=-1)
    turned = (left * cos_BL1d - right * sin_BL1d, right * cos_BL1d + left * sin_BL1d)
    return jnp.concatenate(turned, axis=-1).astype(x_BLND.dtype)


class RelativeBias(nnx.Module):
    """A bias on attention scores for each bucket of distance and each head.

    Drawn with the variance of T5X's, `init_scale` over the mean of buckets and heads,
    from a truncated normal where T5X draws uniformly.
    """

    def __init__(self, key: jax.Array, settings: ModelSettings):
        shape = settings.relative_buckets, settings.num_heads
        self.table = scaled(
            key,
            shape,
            (None, "heads"),
            fan_in=sum(shape) / 2,
            scale=settings.init_scale,
        )


def relative_bucket(
    distance: jax.Array, num_buckets: int, max_distance: int
) -> jax.Array:
    """Returns the bucket of each distance into the past, as T5 does.

    arXiv:1910.10683, section 2.1. The first half of the buckets hold one distance each.
    The others widen in proportion to the distance, up to `max_distance`, and the last
    holds all beyond. Their edges are exact; T5 rounds logarithms in float32.

    Args:
        distance: int32, the query's position less the key's; the future is bucket 0.
        num_buckets: all of them for the past, as the model is causal.
        max_distance: of the logarithmic half.
    """
    exact = num_buckets // 2
    bucket = jnp.clip(distance, 0, exact)
    for edge in _edges(num_buckets, max_distance):
        bucket += (distance >= edge).astype(bucket.dtype)
    return jnp.minimum(bucket, num_buckets - 1)


def _edges(num_buckets: int, max_distance: int) -> list[int]:
    """The least distance of each bucket after the first of the logarithmic half.

    Bucket exact + j begins where log(d / exact) / log(max_distance / exact) reaches
    j / wide, that is, where d^wide · exact^j reaches max_distance^j · exact^wide.
    """
    exact = num_buckets // 2
    wide = num_buckets - exact
    edges, distance = [], exact
    for j in range(1, wide):
        bound = max_distance**j * exact**wide
        while distance**wide * exact**j < bound:
            distance += 1
        edges.append(distance)
    return edges


def relative_bias(
    table: jax.Array,
    query_position_BL: jax.Array,
    key_position_BT: jax.Array,
    max_distance: int,
) -> jax.Array:
    """Looks up the bias of each query, key and head.

    The look-up is a product with one-hot vectors, so that its transpose is one too and
    nothing scatters; both round as float32 products do on the device.

    Args:
        table: [buckets, N].
        query_position_BL: int32, of positions in their segments.
        key_position_BT: the same.
        max_distance: beyond it all distances share the last bucket.
    Returns:
        bias_BNLT in float32.
    """
    distance_BLT = query_position_BL[:, :, None] - key_position_BT[:, None, :]
    num_buckets = table.shape[0]
    bucket_BLT = relative_bucket(distance_BLT, num_buckets, max_distance)
    one_hot = jax.nn.one_hot(bucket_BLT, num_buckets, dtype=jnp.float32)
    return jnp.moveaxis(one_hot @ table.astype(jnp.float32), -1, 1)
