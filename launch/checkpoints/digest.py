"""Checksums of arrays that do not depend on how they are cut over devices."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def digests(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """The digest of each array, in hexadecimal.

    One small program per shape, which a parameter and its moments share, and one at a
    time: simulated devices share a few threads, and with many programs in flight, each
    waiting for its peers, none was left for the peers to run on.
    """
    jax.block_until_ready(arrays)
    return {
        name: f"{int(jax.block_until_ready(digest_of(_on_device(array)))):08x}"
        for name, array in arrays.items()
    }


def _on_device(array: jax.Array) -> jax.Array:
    """An array that is kept in the host's memory, where nothing computes, is copied."""
    place = array.sharding
    if place.memory_kind in (None, "device"):
        return array
    return jax.device_put(array, place.with_memory_kind("device"))


@jax.jit
def digest_of(array: jax.Array) -> jax.Array:
    """Returns a checksum, uint32, that does not depend on how the array is sharded.

    The sum modulo 2³² of every element's bits, mixed with its index. Any change of one
    element changes it for certain, and other changes, such as elements that change
    places, but for one chance in 2³².
    """
    size = array.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(array, {1: "u1", 2: "u2", 4: "u4"}[size])
    index = jnp.zeros(array.shape, jnp.uint32)
    for dim, length in enumerate(array.shape):
        index = index * jnp.uint32(length)
        index += jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim)
    return jnp.sum(_mixed(bits.astype(jnp.uint32) ^ _mixed(index)), dtype=jnp.uint32)


def _mixed(words: jax.Array) -> jax.Array:
    """Permutes the 32-bit words: the last step of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
