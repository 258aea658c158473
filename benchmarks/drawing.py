"""What beam search costs beside greedy drawing, per token.

    python -m benchmarks.drawing [--beams 2 4 8] [--rows 4] [--tokens 32] [--repeats 5]
        [--gin.MACRO=VALUE ...]

The model of configs/runs/demo_span.gin with random parameters, on one device; nothing
ends before its last token. K beams compute as many tokens as greedy drawing of K times
the rows, which is therefore the reference: what is above it is the search itself, with
the reordering of what every layer remembers. All are timed in one run, interleaved.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from launch.config import reader
from launch.config.platform import prepare_environment

RUN = "configs/runs/demo_span.gin"
ONE_DEVICE = ["MESH_DATA=1", "MESH_EXPERT=1", "SIMULATED_DEVICES=1"]


def main() -> None:
    """Times every number of beams and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beams", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--rows", type=int, default=4, help="prompts at once")
    parser.add_argument("--tokens", type=int, default=32, help="drawn of each")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each")
    options, rest = parser.parse_known_args()
    bindings = [word.removeprefix("--gin.") for word in rest]
    config = reader.read([RUN], [*ONE_DEVICE, *bindings])
    prepare_environment(config.settings.platform)

    import jax

    drawn = Drawing(config, options.tokens)
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    for beams in (1, *options.beams):
        runs["greedy", beams] = drawn.greedy(options.rows * beams)
        if beams > 1:
            runs["beams", beams] = drawn.beams(options.rows, beams)
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    ms = {
        name: 1e3 * statistics.median(times) / options.tokens
        for name, times in seconds.items()
    }
    print(f"\n{options.rows} prompts, {options.tokens} tokens of each\n")
    print(f"{'':16} {'ms/token':>9} {'÷ greedy':>9} {'÷ as many rows':>15}")
    print(f"{'greedy':16} {ms['greedy', 1]:9.2f} {1:9.2f}")
    for beams in options.beams:
        own, rows = ms["beams", beams], ms["greedy", beams]
        alone = ms["greedy", 1]
        print(f"{f'{beams} beams':16} {own:9.2f} {own / alone:9.2f} {own / rows:15.2f}")


class Drawing:
    """The model, its parameters, and prompts of random tokens."""

    def __init__(self, config: reader.ResolvedConfig, num_tokens: int) -> None:
        from launch.run.assemble import assemble

        self._run = assemble(config)
        self._num_tokens = num_tokens
        self._params = self._run.init_state().params

    def greedy(self, rows: int) -> Callable[[], Any]:
        """Returns greedy drawing, ready to be compiled by its first call."""
        from moe.model import decoding

        return self._ready(decoding.generate, rows, temperature=0.0)

    def beams(self, rows: int, beams: int) -> Callable[[], Any]:
        """Returns beam search."""
        from moe.model import beam

        return self._ready(beam.search, rows, num_beams=beams, length_penalty=0.6)

    def _ready(self, draw: Callable[..., Any], rows: int, **how: Any) -> Any:
        import jax
        import numpy as np

        from moe.model.memories import Encoded

        settings = self._run.settings
        size, room = settings.model.vocab_size, settings.data.encoder_length
        ids = np.random.default_rng(0).integers(3, size, (rows, room), np.int32)
        source = Encoded(np.full(rows, room, np.int32), ids)
        given = [np.zeros((rows, 1), np.int32), np.zeros(rows, np.int32)]
        if draw.__name__ == "generate":
            given.append(jax.random.key(0))
        drawing = functools.partial(
            draw,
            self._run.learner.model,
            num_tokens=self._num_tokens,
            vocabulary_size=size,
            **how,
        )
        compiled = jax.jit(drawing)

        def run() -> Any:
            with jax.set_mesh(self._run.mesh):
                return compiled(self._params, *given, source)

        return run


if __name__ == "__main__":
    main()
