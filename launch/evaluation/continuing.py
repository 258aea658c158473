"""What follows a prompt: tokens in, tokens out, whatever the shape of the model.

Of an encoder-decoder a prompt goes to the encoder, and the answer is the decoder's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.config.settings import SampleSettings
from launch.run.assemble import Run
from moe.model import beam, decoding
from moe.model.memories import Encoded
from partitioning import rules
from tasks import vocabularies
from tasks.vocabularies import Vocabulary


def continuation(
    run: Run, vocabulary: Vocabulary, sample: SampleSettings, num_tokens: int
) -> Callable[..., jax.Array]:
    """Returns a compiled function (params, tokens_BL, length_B, key) to tokens_BT.

    It takes images before the prompts too, uint8[B, N].

    Args:
        run: the model, and its mesh.
        vocabulary: which ids may follow, and which ends.
        sample: draws, or beams.
        num_tokens: tokens to draw at most.
    """
    whole_prompt = run.settings.data.prefix_attention == "bidirectional"
    model, start_token = run.learner.model, run.settings.data.start_token
    start_id = vocabularies.start_id(vocabulary, start_token)

    def follow(
        params: Any,
        token_BL: jax.Array,
        length_B: jax.Array,
        key: jax.Array,
        image_BN: jax.Array | None = None,
    ) -> jax.Array:
        source = None
        if run.settings.data.layout == "encoder_decoder":
            source = Encoded(jnp.maximum(length_B, 0), token_BL)
            # A row without a prompt is still empty.
            token_BL, length_B = token_BL[:, :1] * 0, jnp.minimum(length_B, 0)
        if sample.num_beams > 1:
            token_BKT, _ = beam.search(
                model,
                params,
                token_BL,
                length_B,
                source,
                image_BN,
                num_beams=sample.num_beams,
                length_penalty=sample.length_penalty,
                num_tokens=num_tokens,
                vocabulary_size=vocabulary.size,
                first_id=int(vocabulary.has_padding),
                eos_id=vocabulary.eos_id,
                whole_prompt=whole_prompt,
                start_id=start_id,
            )
            return token_BKT[:, 0]
        return decoding.generate(
            model,
            params,
            token_BL,
            length_B,
            key,
            source,
            image_BN,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            num_tokens=num_tokens,
            vocabulary_size=vocabulary.size,
            first_id=int(vocabulary.has_padding),
            eos_id=vocabulary.eos_id,
            whole_prompt=whole_prompt,
            start_id=start_id,
        )

    return jax.jit(follow, out_shardings=rules.replicated(run.mesh))


def until_end(ids: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Cuts off the first end of a sequence, and what follows."""
    ids = list(ids)
    return ids[: ids.index(vocabulary.eos_id)] if vocabulary.eos_id in ids else ids


def padded(prompts: Sequence[Sequence[int]], room: int) -> np.ndarray:
    """Lays prompts out as int32[B, room]."""
    token_BL = np.zeros((len(prompts), room), np.int32)
    for row, ids in enumerate(prompts):
        token_BL[row, : len(ids)] = ids
    return token_BL
