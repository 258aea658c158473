"""Memory and time that `switchyard convert` takes for a billion parameters.

    python -m benchmarks.convert [--layers 16] [--folder DIR]

Writes a model of OLMoE's family with random bfloat16 weights, converts it to a run and
back in processes of their own, without comparing them and then once with it, and prints
for each what the process had in memory at most, over the bytes of the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from launch.exchange.header import Form
from launch.exchange.writing import write_tensors

WIDTH, HEADS, EXPERTS, EXPERT_WIDTH, VOCAB = 1024, 16, 32, 576, 50304
_BYTES_OF_UNIT = 1024  # ru_maxrss of Linux


def main() -> None:
    """Converts there and back, and prints a line for each."""
    assert __doc__
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--layers", type=int, default=16, help="layers of the model")
    parser.add_argument("--folder", type=Path, help="where there is room for 12 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        public, run, back = (Path(folder, name) for name in ("public", "run", "back"))
        size = _made(public, options.layers)
        print(f"{size / 2 / 1e9:.2f} billion parameters, {size / 1e9:.2f} GB")
        print(f"{'':24s}seconds  memory  over the model's bytes")
        as_it_is = "--gin.PARAM_DTYPE=bfloat16"
        _measured("in, not compared", size, public, run, "--unchecked", as_it_is)
        _measured("out, not compared", size, run, back, "--unchecked")
        again = Path(folder, "again")
        _measured("out, and compared", size, run, again)
        _measured("compared", size, again, run, "--check")


def _measured(what: str, size: int, *words: object) -> None:
    """Runs `switchyard convert`, and prints what it took."""
    began = time.monotonic()
    code = (
        "import resource, sys; from launch import cli; code = cli.main(); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "convert", *map(str, words), "--quiet"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1]) * _BYTES_OF_UNIT
    took = time.monotonic() - began
    print(f"{what:24s}{took:7.1f}  {peak / 1e9:.2f} GB  {peak / size:.3f}", flush=True)


def _made(folder: Path, layers: int) -> int:
    """Writes the model; returns the bytes of its weights."""
    folder.mkdir()
    said = {
        "model_type": "olmoe",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": EXPERT_WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 4,
    }
    (folder / "config.json").write_text(json.dumps(said))
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "a", "b"])}
    made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<pad>", "</s>"])
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    forms = {name: Form(bfloat16, shape) for name, shape in _shapes(layers)}
    draw = np.random.default_rng(0)

    def tensor(name: str) -> np.ndarray:
        made = draw.standard_normal(forms[name].shape, np.float32)
        made *= np.float32(forms[name].shape[-1] ** -0.5)
        return (made if "norm" not in name else np.ones_like(made)).astype(bfloat16)

    write_tensors(folder, forms, tensor)
    return sum(form.num_bytes for form in forms.values())


def _shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, WIDTH)
    yield "lm_head.weight", (VOCAB, WIDTH)
    yield "model.norm.weight", (WIDTH,)
    for n in range(layers):
        at = f"model.layers.{n}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}.{name}.weight", (WIDTH,)
        for name in ("q_norm", "k_norm"):
            yield f"{at}.self_attn.{name}.weight", (WIDTH,)
        for name in ("q", "k", "v", "o"):
            yield f"{at}.self_attn.{name}_proj.weight", (WIDTH, WIDTH)
        yield f"{at}.mlp.gate.weight", (EXPERTS, WIDTH)
        for e in range(EXPERTS):
            for name in ("gate", "up"):
                yield f"{at}.mlp.experts.{e}.{name}_proj.weight", (EXPERT_WIDTH, WIDTH)
            yield f"{at}.mlp.experts.{e}.down_proj.weight", (WIDTH, EXPERT_WIDTH)


if __name__ == "__main__":
    main()
