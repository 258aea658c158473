"""Text from a checkpoint."""

import argparse
import functools
from typing import Any

import jax
import numpy as np

from launch.assemble import Run
from launch.errors import EXIT_DONE, UserError
from launch.gin_files import ResolvedConfig
from launch.settings import Settings
from launch.task_metrics import until_end
from launch.terminal import waiting
from launch.trained import restored
from moe.model import decoding
from partitioning import rules
from tasks.vocabularies import Vocabulary

_PROMPT_STEP = 64  # prompts are padded to a multiple, so that few lengths compile


def main(config: ResolvedConfig, options: argparse.Namespace) -> int:
    """Prints a prompt and its continuation; nothing else goes to standard output."""
    with restored(config, options) as trained:
        vocabulary = trained.store.vocabulary
        with waiting("drawing tokens", quiet=options.quiet):
            continuation = continue_prompt(trained.run, trained.params, vocabulary)
    between = "\n" if config.settings.data.objective == "seq2seq" else ""
    print(config.settings.sample.prompt + between + continuation)
    return EXIT_DONE


class SampleError(UserError):
    """What is to be drawn does not fit the model."""


def encode_prompt(settings: Settings, vocabulary: Vocabulary) -> list[int]:
    """Returns the tokens of the settings' prompt.

    Raises:
        SampleError: with what is to follow they are more than a model of learned
            positions knows.
    """
    model, sample = settings.model, settings.sample
    prompt = vocabulary.encode(sample.prompt)
    if settings.data.objective == "seq2seq":  # as every document of inputs ends
        prompt = [*prompt, vocabulary.eos_id]
    needed, known = len(prompt) + sample.num_tokens, model.max_positions
    if model.positions == "learned" and needed > known:
        left = known - len(prompt)
        remedy = f"lower SAMPLE_TOKENS (--num_tokens) to {left}"
        if left < 1:
            remedy = f"shorten the prompt to fewer than {known} tokens"
        raise SampleError(
            f"MAX_POSITIONS = {known}: a prompt of {len(prompt)} tokens and "
            f"SAMPLE_TOKENS = {sample.num_tokens} need {needed} positions, and the "
            f"model has learned no more: {remedy}"
        )
    return prompt


def continue_prompt(run: Run, params: Any, vocabulary: Vocabulary) -> str:
    """Draws a continuation of the settings' prompt, on the run's mesh.

    Every shard of the batch draws one row, since a batch is never smaller than its
    shards; the first row is the answer, the same on every mesh.

    Returns:
        What follows the prompt; of a run that learnt targets from inputs, the targets.
    Raises:
        SampleError: it does not fit the model.
    """
    data, sample = run.settings.data, run.settings.sample
    answers = data.objective == "seq2seq"
    prompt = encode_prompt(run.settings, vocabulary)
    room = -(-max(len(prompt), 1) // _PROMPT_STEP) * _PROMPT_STEP
    rows = run.settings.mesh.batch_shards
    prompt_BL = np.zeros((rows, room), np.int32)
    prompt_BL[:, : len(prompt)] = prompt
    draw = jax.jit(
        functools.partial(
            decoding.generate,
            run.learner.model,
            num_tokens=sample.num_tokens,
            vocabulary_size=vocabulary.size,
            temperature=sample.temperature,
            top_k=sample.top_k,
            top_p=sample.top_p,
            first_id=int(vocabulary.has_padding),
            eos_id=vocabulary.eos_id,
            whole_prompt=data.prefix_attention == "bidirectional",
        ),
        out_shardings=rules.replicated(run.mesh),
    )
    tokens_BT = draw(
        params,
        jax.device_put(prompt_BL, rules.sharding(run.mesh, ("batch", None))),
        np.full(rows, len(prompt), np.int32),
        jax.random.key(sample.seed),
    )
    tokens = until_end(np.asarray(tokens_BT)[0].tolist(), vocabulary)
    if answers:
        return vocabulary.decode(tokens)
    whole = vocabulary.decode([*prompt, *tokens])
    return whole[len(vocabulary.decode(prompt)) :]
