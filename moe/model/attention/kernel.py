"""Attention by kernels that libraries keep: cuDNN's on GPU, splash on TPU.

`whole` and `blocks` are their oracle. Which is taken, `kernel_method.pick` decides.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moe.model.attention.blocks import ATTENDED_NAMES
from moe.model.attention.kernel_method import Kernel, block
from moe.model.attention.mask import Who
from moe.model.attention.scoring import Scoring, by_key_head


def attend(
    query_BLND: jax.Array,
    key_BLUD: jax.Array,
    value_BLUX: jax.Array,
    queries: Who,
    keys: Who,
    scoring: Scoring,
    *,
    method: Kernel,
) -> jax.Array:
    """Mixes values by a softmax over the scores, with nothing of all scores kept.

    Queries and keys are of the same tokens, from a row's first on, so that every one
    sees itself at least. Inside `shard_map` it needs `check_vma=False`.

    Args:
        query_BLND: queries, not yet scaled; N is a multiple of U.
        key_BLUD: keys.
        value_BLUX: values.
        queries: who the queries are.
        keys: who the keys are.
        scoring: what scores are made of, without what `kernel_method.pick` refuses.
        method: what that returns; "cudnn_interpreted" and "splash_interpreted" do on
            CPU what those do, for tests.
    Returns:
        mixed_BLNX in the dtype of the values.
    """
    assert scoring.bias is None  # cuDNN would leave out the gradient, and say nothing
    by_head_BLUnD = by_key_head(query_BLND, key_BLUD.shape[2], scoring)
    query_BLND = by_head_BLUnD.reshape(query_BLND.shape)
    if method in ("splash", "splash_interpreted"):
        return _splash(query_BLND, key_BLUD, value_BLUX, queries, keys, scoring, method)
    assert scoring.sink_N is None
    assert not scoring.cap
    # The mask says it all. These only skip blocks, and a prefix sees those they skip.
    causal, window = scoring.causal and queries.prefix_BL is None, scoring.window
    return jax.nn.dot_product_attention(
        query_BLND,
        key_BLUD,
        value_BLUX,
        mask=scoring.visible(queries, keys)[:, None],
        scale=1.0,
        is_causal=causal,
        local_window_size=(window - 1, 0) if causal and window else None,
        implementation="xla" if method == "cudnn_interpreted" else "cudnn",
    )


def _splash(
    query_BLND: jax.Array,
    key_BLUD: jax.Array,
    value_BLUX: jax.Array,
    queries: Who,
    keys: Who,
    scoring: Scoring,
    method: Kernel,
) -> jax.Array:
    """Blocks, of which those that nothing sees are skipped."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, L, N, _ = query_BLND.shape
    tokens = block(method, L)
    back = scoring.window - 1 if scoring.window else None
    seen = splash.LocalMask((L, L), (back, 0 if scoring.causal else back), offset=0)
    sizes = splash.BlockSizes(
        block_q=tokens,
        block_kv=tokens,
        block_kv_compute=tokens,
        block_q_dkv=tokens,
        block_kv_dkv=tokens,
        block_kv_dkv_compute=tokens,
        block_q_dq=tokens,
        block_kv_dq=tokens,
    )
    attend_row = splash.make_splash_mha(
        splash.MultiHeadMask([seen] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scoring.cap or None,
        residual_checkpoint_name=ATTENDED_NAMES[0],
        interpret=method == "splash_interpreted",
    )

    def one(
        query_NLD: Any, key_ULD: Any, value_ULX: Any, query_L: Any, key_L: Any
    ) -> Any:
        segments = splash.SegmentIds(query_L, key_L)
        return attend_row(query_NLD, key_ULD, value_ULX, segments, scoring.sink_N)

    mixed_BNLX = jax.vmap(one)(
        jnp.swapaxes(query_BLND, 1, 2),
        jnp.swapaxes(key_BLUD, 1, 2),
        jnp.swapaxes(value_BLUX, 1, 2),
        queries.segment_BL,
        keys.segment_BL,
    )
    return jnp.swapaxes(mixed_BNLX, 1, 2)
