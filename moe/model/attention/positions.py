"""Where tokens stand: rotary angles, and biases by distance."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe.model.parameters import Spec
from moe.settings import PositionSettings


def rotate(
    x_BLND: jax.Array, position_BL: jax.Array, positions: PositionSettings
) -> jax.Array:
    """Turns pairs of numbers by position · rate (arXiv:2104.09864, eq. 34).

    Args:
        x_BLND: queries or keys.
        position_BL: position of each token in its segment.
        positions: how many of the D are turned, which of them together, how fast.
    Returns:
        The same, turned; where one's neighbour turns with it, both stay in place.
    """
    D = positions.turned(x_BLND.shape[-1])
    rate_d, factor = rates(D, positions)
    angle_BLd = position_BL[..., None].astype(jnp.float32) * rate_d
    cos_BL1d, sin_BL1d = jnp.cos(angle_BLd)[:, :, None], jnp.sin(angle_BLd)[:, :, None]
    if factor != 1:
        cos_BL1d, sin_BL1d = cos_BL1d * factor, sin_BL1d * factor
    x = x_BLND[..., :D].astype(jnp.float32)
    if positions.pairs == "neighbours":
        left, right = x[..., 0::2], x[..., 1::2]
    else:
        left, right = jnp.split(x, 2, axis=-1)
    turned = (left * cos_BL1d - right * sin_BL1d, right * cos_BL1d + left * sin_BL1d)
    if positions.pairs == "neighbours":
        y_BLND = jnp.stack(turned, axis=-1).reshape(x.shape)
    else:
        y_BLND = jnp.concatenate(turned, axis=-1)
    y_BLND = y_BLND.astype(x_BLND.dtype)
    if x_BLND.shape[-1] == D:
        return y_BLND
    return jnp.concatenate([y_BLND, x_BLND[..., D:]], axis=-1)


def rates(D: int, positions: PositionSettings) -> tuple[jax.Array, float]:
    """Returns the angle per position of each pair, and the factor of what is turned.

    base^(-2d/D) for d below D/2, or less where they are scaled to reach farther:
    "linear" is arXiv:2306.15595, eq. 4; "by_parts" arXiv:2309.00071, eq. 17 to 19.
    "yarn" is what its authors' code does: the share falls along d, between the two d
    that turn `fast_turns` and `slow_turns` times, and not with the number of turns.

    Args:
        D: numbers of a head that are turned.
        positions: base, scaling, and the lengths of these.
    """
    half, p = D // 2, positions
    rate_d = p.rotary_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if p.scaling == "none":
        return rate_d, 1.0
    kept_d: np.ndarray = np.zeros(half)  # share of an angle that is not divided
    factor = 1.0
    if p.scaling == "by_parts":
        turns_d = p.original_length * p.rotary_base ** (-np.arange(half) / half)
        turns_d /= 2 * math.pi
        kept_d = (turns_d - p.slow_turns) / (p.fast_turns - p.slow_turns)
    elif p.scaling == "yarn":
        factor = p.yarn_factor
        first, last = (
            half
            * math.log(p.original_length / (2 * math.pi * turns))
            / math.log(p.rotary_base)
            for turns in (p.fast_turns, p.slow_turns)
        )
        if p.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        width = last - first or 0.001
        kept_d = 1 - (np.arange(half) - first) / width
    kept_d = np.clip(kept_d, 0, 1)
    return rate_d * (kept_d + (1 - kept_d) / p.factor).astype(np.float32), factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias:
    """A bias by distance, added to scores.

    Within a segment positions differ as places in the row do, so it is a function of
    the difference of places alone.

    Attributes:
        by_distance_NZ: float32, bias of each head at the distances -Z/2, ..., Z/2 - 1
            from a query back to a key.
    """

    by_distance_NZ: jax.Array

    def of(self, place_L: jax.Array, place_T: jax.Array) -> jax.Array:
        """Returns bias_NLT of consecutive queries and consecutive keys.

        Row l is a window of the distances that moves by one from row to row: rows of
        one array, cut one number shorter than they are long. Nothing is looked up, so
        its transpose scatters nothing.
        """
        (N, Z), L, T = self.by_distance_NZ.shape, len(place_L), len(place_T)
        least = place_L[0] - place_T[0] - (T - 1)
        window_NX = lax.dynamic_slice_in_dim(
            self.by_distance_NZ, Z // 2 + least, L + T - 1, axis=1
        )
        # The farthest key comes first: distances fall along T, and rise along L.
        falling_NX = jnp.pad(window_NX[:, ::-1], ((0, 0), (0, 1)))
        rows_N = jnp.broadcast_to(falling_NX[:, None], (N, L, L + T)).reshape(N, -1)
        rows_N = rows_N[:, L - 1 : L - 1 + L * (L + T - 1)]
        return rows_N.reshape(N, L, L + T - 1)[:, :, :T]


def table_spec(settings: PositionSettings, num_heads: int, scale: float) -> Spec:
    """Describes the bias of each bucket of distance and each head, [buckets, N].

    It is drawn with the variance of T5X's, `scale` over the mean of buckets and heads,
    from a truncated normal where T5X draws uniformly.
    """
    shape = settings.buckets, num_heads
    return Spec(
        shape, (None, "heads"), outputs=(0, 1), stddev=(2 * scale / sum(shape)) ** 0.5
    )


def bias_of(table: jax.Array, reach: int, settings: PositionSettings) -> Bias:
    """Looks up the bias at every distance below `reach`, forward and back.

    The look-up is a product with one-hot vectors, so that its transpose is one too.

    Args:
        table: [buckets, N].
        reach: tokens of a row, and so many more as blocks of it may reach beyond.
        settings: the distance from which on all share the last bucket.
    """
    bucket_Z = bucket_of(np.arange(-reach, reach), settings)
    one_hot = jax.nn.one_hot(bucket_Z, len(table), dtype=jnp.float32)
    return Bias((one_hot @ table.astype(jnp.float32)).T)


def falling(slope_N: jax.Array, reach: int) -> Bias:
    """Takes the distance from scores, forward and back, times a slope of each head."""
    distance_Z = np.abs(np.arange(-reach, reach))
    return Bias(-slope_N[:, None] * distance_Z)


def slopes(num_heads: int) -> np.ndarray:
    """Returns the slope of each head (arXiv:2108.12409, section 3).

    2^(-8/N), 2^(-16/N), ..., 2^-8 for N a power of 2. Else those of the power P below,
    and between them every other of those of 2P, as its authors' code has it.
    """
    power = 2 ** int(math.log2(num_heads))
    steep = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * power, 2) / power)
    return np.concatenate([steep, between[: num_heads - power]]).astype(np.float32)


def bucket_of(distance: np.ndarray, settings: PositionSettings) -> np.ndarray:
    """Returns the bucket of each distance, as T5 does.

    arXiv:1910.10683, section 2.1. The first half of the buckets of a side hold one
    distance each. The others widen in proportion to the distance, up to `max_distance`,
    and the last holds all beyond.

    Args:
        distance: the query's position less the key's. Keys ahead have the second half
            of the buckets if these are two-sided, and else bucket 0.
        settings: number of buckets, and the end of the logarithmic half.
    """
    number = settings.buckets // (2 if settings.two_sided else 1)
    exact = number // 2
    past = np.abs(distance) if settings.two_sided else np.maximum(distance, 0)
    share = np.log(np.maximum(past, 1) / exact) / np.log(settings.max_distance / exact)
    # A distance on an edge belongs to the bucket that begins there, however it rounds.
    wide = (share * (number - exact) + 1e-12).astype(int)
    bucket = np.where(past < exact, past, np.minimum(exact + wide, number - 1))
    return bucket + number * (settings.two_sided & (distance < 0))
