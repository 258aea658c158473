"""Multi-head latent attention (arXiv:2405.04434, section 2.1; arXiv:2412.19437, 2.1.1).

What is remembered of a token is one latent vector and one key with positions, both for
all heads. Training makes keys and values of it, and makes them again on the way back,
as DeepSeek-V3 does (section 3.2.1). Few tokens that are drawn ask in the latent space
instead: query · (latent · up) is (query · upᵀ) · latent, and values are made of what
the latents are mixed to.

Latents are made where the residual stream is cut, and so, over `model`, travel in its
place: `attend` is given them side by side, after the stream itself if that is needed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe.model import norms
from moe.model.attention.attend import (
    Kind,
    LargestLogits,
    Memory,
    Weights,
    attend,
)
from moe.model.attention.positions import rotate
from moe.model.attention.scoring import Scoring
from moe.model.execution import Execution
from moe.model.parameters import Spec, matrix, vector
from moe.model.products import product, product_by_head, product_made_again
from moe.model.view import View
from moe.settings import LatentSettings


def specs(s: LatentSettings, width: int) -> dict[str, Spec | dict[str, Spec]]:
    """Describes the projections down to latents, which are whole, and up to heads."""
    N, C, X = s.num_heads, s.kv_latent, s.value_dim

    def down(latent: int) -> Spec:
        axes = ("embed", "latent")
        return matrix((width, latent), axes, (0,), (1,), s.init_scale)

    def up(latent: int, head: int, scale: float = 1.0) -> Spec:
        axes = ("embed", "heads", "head_dim")
        return matrix((latent, N, head), axes, (0,), (1, 2), scale * s.init_scale)

    # As in `heads.specs`, scores start alike whatever their factor is.
    first = 1 / (s.key_width * s.score_scale**2) if s.score_scale else 1.0
    outward = ("heads", "head_dim", "embed")
    found: dict[str, Spec | dict[str, Spec]] = {
        "kv_down": down(C),
        "kv_norm": norms.specs(s.norm, C),
        "rope_key": down(s.rope_dim),
        "key_up": up(C, s.head_dim),
        "value_up": up(C, X),
        "output": matrix((N, X, width), outward, (0, 1), (2,), s.init_scale),
    }
    if s.sinks:
        found["sink"] = vector((N,), ("heads",))
    if s.gated:
        found["output_gate"] = up(width, X)
    if not s.query_latent:
        return found | {"query_up": up(width, s.key_width, first)}
    return found | {
        "query_down": down(s.query_latent),
        "query_norm": norms.specs(s.norm, s.query_latent),
        "query_up": up(s.query_latent, s.key_width, first),
    }


def memory(s: LatentSettings) -> dict[str, Spec]:
    """Describes what drawing keeps of a token, whatever the number of heads."""
    return {
        "latent": vector((s.kv_latent,), ("latent",)),
        "rope_key": vector((s.rope_dim,), ("head_dim",)),
    }


def apply(
    w: Weights,
    x_BLM: jax.Array,
    view: View,
    memory: Memory | None,
    s: LatentSettings,
    key: jax.Array | None,
    number: jax.Array,
    execution: Execution,
) -> tuple[jax.Array, Memory | None, LargestLogits | None]:
    """Attends; see `attend`. Nothing is drawn."""
    del key, number
    absorbs = memory is not None and s.absorbs(x_BLM.shape[1])
    kind = IN_LATENT_SPACE if absorbs else KIND
    down_BLC = _down(w, x_BLM, s)
    return attend(kind, w, down_BLC, view, memory, s, execution)


def _down(w: Weights, x_BLM: jax.Array, s: LatentSettings) -> jax.Array:
    """Makes all latents, and the key that is not turned yet, side by side."""
    parts = [] if s.query_latent and not s.gated else [x_BLM]
    if s.query_latent:
        latent_BLC = product(x_BLM, w["query_down"])
        parts.append(norms.normalise(w["query_norm"], latent_BLC, s.norm))
    latent_BLC = product(x_BLM, w["kv_down"])
    parts.append(norms.normalise(w["kv_norm"], latent_BLC, s.norm))
    return jnp.concatenate([*parts, product(x_BLM, w["rope_key"])], axis=-1)


def _parts(down_BLC: jax.Array, s: LatentSettings) -> tuple[jax.Array, ...]:
    """Parts what `_down` made: the stream, latents of queries and keys, the key."""
    width = down_BLC.shape[-1] - s.query_latent - s.kv_latent - s.rope_dim
    ends = [width, width + s.query_latent, down_BLC.shape[-1] - s.rope_dim]
    return tuple(jnp.split(down_BLC, ends, axis=-1))


def with_logits_times(
    w: Weights, factor_N: jax.Array, s: LatentSettings
) -> dict[str, jax.Array]:
    """Returns those weights that change, so that a head's logits are times a factor.

    The part without positions shares it by its root between queries and keys; of the
    other the key is that of all heads, and queries alone change (arXiv:2507.20534,
    section 2.1). What is frozen changes nothing, and leaves it to the queries.

    Args:
        w: the sublayer's parameters, led by layers; None in place of frozen ones.
        factor_N: positive, led by layers too.
        s: record of the sublayer.
    """
    query, key = w["query_up"], w["key_up"]
    if query is None:
        return {}
    turned_1N1 = factor_N[..., None, :, None]
    bare_1N1 = turned_1N1 if key is None else jnp.sqrt(turned_1N1)
    bare, turned = jnp.split(query, [s.head_dim], axis=-1)
    both = jnp.concatenate([bare * bare_1N1, turned * turned_1N1], axis=-1)
    changed = {"query_up": both.astype(query.dtype)}
    if key is not None:
        changed["key_up"] = (key * bare_1N1).astype(key.dtype)
    return changed


def _ask(
    w: Weights, down_BLC: jax.Array, position_BL: jax.Array, s: LatentSettings
) -> jax.Array:
    """Makes query_BLND, whose last R numbers know positions (eq. 37 to 40)."""
    x_BLM, latent_BLC, _, _ = _parts(down_BLC, s)
    if s.query_latent:
        query_BLND = product_made_again(latent_BLC, w["query_up"])
    else:
        query_BLND = product(x_BLM, w["query_up"])
    bare_BLND, turned_BLNR = jnp.split(query_BLND, [s.head_dim], axis=-1)
    turned_BLNR = _turned(turned_BLNR, position_BL, s)
    return jnp.concatenate([bare_BLND, turned_BLNR], axis=-1)


def _remember(
    w: Weights, down_BLC: jax.Array, position_BL: jax.Array, s: LatentSettings
) -> Memory:
    """Keeps latent_BLC and the key of all heads, turned (eq. 41 and 43)."""
    del w
    _, _, latent_BLC, key_BLR = _parts(down_BLC, s)
    turned_BLR = _turned(key_BLR[:, :, None], position_BL, s)[:, :, 0]
    return {"latent": latent_BLC, "rope_key": turned_BLR}


def _expand(
    w: Weights, memory: Memory, s: LatentSettings
) -> tuple[jax.Array, jax.Array]:
    """Makes keys and values of every head (eq. 42, 44 and 45)."""
    bare_BTND = product_made_again(memory["latent"], w["key_up"])
    shape = *bare_BTND.shape[:3], s.rope_dim
    turned_BTNR = jnp.broadcast_to(memory["rope_key"][:, :, None], shape)
    key_BTND = jnp.concatenate([bare_BTND, turned_BTNR], axis=-1)
    return key_BTND, product_made_again(memory["latent"], w["value_up"])


def _scoring(w: Weights, view: View, reach: int, s: LatentSettings) -> Scoring:
    del view, reach
    sink_N = w.get("sink")
    return Scoring(s.scale, s.window, s.cap, sink_N=sink_N, causal=s.causal)


def _turned(x_BLNR: jax.Array, position_BL: jax.Array, s: LatentSettings) -> jax.Array:
    if s.positions.kind != "rotary":
        return x_BLNR
    # The scale has YaRN's factor already, for both parts.
    positions = dataclasses.replace(s.positions, attention_factor=1.0)
    return rotate(x_BLNR, position_BL, positions)


def _ask_in_latent_space(
    w: Weights, down_BLC: jax.Array, position_BL: jax.Array, s: LatentSettings
) -> jax.Array:
    query_BLND = _ask(w, down_BLC, position_BL, s)
    bare_BLND, turned_BLNR = jnp.split(query_BLND, [s.head_dim], axis=-1)
    query_BLNC = product_by_head(bare_BLND, jnp.swapaxes(w["key_up"], 0, 2))
    return jnp.concatenate([query_BLNC, turned_BLNR], axis=-1)


def _as_one_head(
    w: Weights, memory: Memory, s: LatentSettings
) -> tuple[jax.Array, jax.Array]:
    """Takes what is remembered for a key, and the latent for a value, of all heads."""
    del w, s
    key_BTC = jnp.concatenate([memory["latent"], memory["rope_key"]], axis=-1)
    return key_BTC[:, :, None], memory["latent"][:, :, None]


def _finish(
    w: Weights, mixed_BLNX: jax.Array, down_BLC: jax.Array, s: LatentSettings
) -> jax.Array:
    if not s.gated:
        return mixed_BLNX
    gate_BLNX = product(_parts(down_BLC, s)[0], w["output_gate"])
    return mixed_BLNX * jax.nn.sigmoid(gate_BLNX)


def _out_of_latent_space(
    w: Weights, mixed_BLNC: jax.Array, down_BLC: jax.Array, s: LatentSettings
) -> jax.Array:
    return _finish(w, product_by_head(mixed_BLNC, w["value_up"]), down_BLC, s)


KIND = Kind(_ask, _remember, _expand, _scoring, _finish)
IN_LATENT_SPACE = Kind(
    _ask_in_latent_space, _remember, _as_one_head, _scoring, _out_of_latent_space
)
