"""`switchyard generate`."""

import dataclasses
import functools
from typing import TYPE_CHECKING

from launch.commands import Command, RunOptions, allow_module, kept_by_run, option
from launch.errors import EXIT_DONE

if TYPE_CHECKING:
    from launch.config.reader import ResolvedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """What `generate` accepts: knobs under shorter names."""

    prompt: str | None = option("text to continue", macro="SAMPLE_PROMPT")
    image: str | None = option(
        "image file before the text, for a model that has images", metavar="FILE"
    )
    num_tokens: int | None = option("tokens to draw at most", macro="SAMPLE_TOKENS")
    temperature: float | None = option(
        "temperature of the softmax; 0 takes the likeliest", macro="SAMPLE_TEMPERATURE"
    )
    top_k: int | None = option(
        "draw from the k likeliest tokens; 0: from all", macro="SAMPLE_TOP_K"
    )
    top_p: float | None = option(
        "draw from the smallest set of this probability", macro="SAMPLE_TOP_P"
    )
    seed: int | None = option("seed of the draws", macro="SAMPLE_SEED")
    num_beams: int | None = option(
        "hypotheses of beam search, instead of draws; 1: draw", macro="NUM_BEAMS"
    )
    allow_module: bool = allow_module()


def run(config: "ResolvedConfig", options: GenerateOptions) -> int:
    """Prints a prompt and its continuation; nothing else goes to standard output."""
    from launch.checkpoints.trained import restored, vocabulary_of
    from launch.evaluation import images, prompts, sampling
    from launch.run import user_code
    from launch.run.assemble import assemble
    from launch.terminal.lines import waiting

    config = user_code.admitted(config, allowed=options.allow_module)
    run = assemble(config)
    image_N = None
    if options.image is not None:
        image_N = images.read(options.image, config.settings.data)
    vocabulary = vocabulary_of(config)
    during = functools.partial(waiting, quiet=options.quiet)
    given = config, run, vocabulary, options.step
    with restored(*given, quiet=options.quiet) as (params, _), during("drawing tokens"):
        text = sampling.continue_prompt(run, params, vocabulary, image_N)
    print(prompts.with_prompt(config.settings, text))
    return EXIT_DONE


COMMAND = Command(
    group="Use a model",
    summary="continue a text with a trained model",
    description="""\
Continues a text with a checkpoint of a run.

  switchyard generate --model_dir=runs/demo --prompt='def main(' --num_tokens=64
  switchyard generate --model_dir=runs/demo --prompt='import ' --temperature=0
  switchyard generate --model_dir=runs/demo_span --prompt='def <extra_id_0>(self):'
  switchyard generate --model_dir=runs/demo_image --image=seven.png --temperature=0

A model that has learnt to fill in masked spans is asked with <extra_id_0>, <extra_id_1>
and so on in their places; what it says of each stands there in the answer.
The run's own config.gin is read first; files, knobs and options given here override it.
What is not given is taken from its SAMPLE_ knobs. Only the text goes to standard
output.
""",
    options=GenerateOptions,
    reads=kept_by_run,
    keeps_nothing=True,
    run=run,
)
