"""Text from a checkpoint."""

from typing import Any

import jax
import numpy as np

from launch.evaluation.continuing import continuation, padded, until_end
from launch.evaluation.prompts import answers, encode_prompt, filled, fills
from launch.run.assemble import Run
from partitioning import rules
from tasks.vocabularies import Vocabulary

_PROMPT_STEP = 64  # prompts are padded to a multiple, so that few lengths compile


def continue_prompt(
    run: Run, params: Any, vocabulary: Vocabulary, image_N: np.ndarray | None = None
) -> str:
    """Draws a continuation of the settings' prompt, on the run's mesh.

    An image may stand before the prompt, uint8[N].

    Every shard of the batch draws one row, since a batch is never smaller than its
    shards; the first row is the answer, the same on every mesh.

    Returns:
        What follows the prompt; of a run that learnt targets from inputs, the targets;
        of one that fills blanks, the prompt with its blanks filled.
    Raises:
        SampleError: it does not fit the model.
    """
    sample = run.settings.sample
    patches = 0 if image_N is None else run.settings.data.num_patches
    prompt = encode_prompt(run.settings, vocabulary, patches)
    room = -(-max(len(prompt), 1) // _PROMPT_STEP) * _PROMPT_STEP
    rows = run.settings.mesh.batch_shards
    token_BL = padded([prompt] * rows, room)
    follow = continuation(run, vocabulary, sample, sample.num_tokens)
    by_row = rules.sharding(run.mesh, ("batch", None))
    images = [] if image_N is None else [np.stack([image_N] * rows)]
    tokens_BT = follow(
        params,
        jax.device_put(token_BL, by_row),
        np.full(rows, len(prompt), np.int32),
        jax.random.key(sample.seed),
        *(jax.device_put(image_BN, by_row) for image_BN in images),
    )
    tokens = until_end(np.asarray(tokens_BT)[0].tolist(), vocabulary)
    if fills(run.settings):
        return filled(sample.prompt, tokens, vocabulary)
    if answers(run.settings):
        return vocabulary.decode(tokens)
    whole = vocabulary.decode([*prompt, *tokens])
    return whole[len(vocabulary.decode(prompt)) :]
