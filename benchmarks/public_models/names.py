"""How the arrays of a public model become ours: their names, and their dims.

A rule stands under the path of one of our arrays. It is the name of theirs and what is
done to its dims, "ND,M -> M,N,D": a letter is a dim; letters side by side are one dim
of theirs that ours keeps as several. "[D|W]" is two blocks of one dim, one after the
other, of which the right side names the one taken. Without an arrow both are the same.
Names joined by " + " are arrays that are stacked in a new first dim, c.

Letters are those of `moe`, and W width of a head's values, R width of a latent, P
turned numbers of a key, c gate and up.

The names are those of a model in memory, where the experts of a layer are one array.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

Rule = tuple[str, str]
Rules = dict[str, Rule]


def gated(ours: str, theirs: str) -> Rules:
    """Returns the rules of a feed-forward whose gate is a matrix of its own."""
    return {
        f"{ours}/up": (
            f"{theirs}.gate_proj.weight + {theirs}.up_proj.weight",
            "c,F,M -> M,c,F",
        ),
        f"{ours}/down": (f"{theirs}.down_proj.weight", "M,F -> F,M"),
    }


def norms(**names: str) -> Rules:
    """Returns the rules of norms, such as attention_norm="input_layernorm".

    A feed-forward's norm is that of the dense sublayers and of the sparse ones.
    """
    rules: Rules = {}
    for ours, theirs in names.items():
        sublayer, _, norm = ours.partition("_")
        for each in ("dense", "sparse") if sublayer == "mlp" else (sublayer,):
            rules[f"{each}/{norm}/scale"] = (f"{theirs}.weight", "M")
    return rules


# Most families name and shape these so. A rule of what a model lacks is not used.
RULES: Rules = {
    "embedding": ("model.embed_tokens.weight", "V,M"),
    "head": ("lm_head.weight", "V,M -> M,V"),
    "decoder/norm/scale": ("model.norm.weight", "M"),
    # Of a layer, in which their names begin with model.layers.NUMBER.
    **norms(attention_norm="input_layernorm", mlp_norm="post_attention_layernorm"),
    "attention/query": ("self_attn.q_proj.weight", "ND,M -> M,N,D"),
    "attention/key": ("self_attn.k_proj.weight", "UD,M -> M,U,D"),
    "attention/value": ("self_attn.v_proj.weight", "UD,M -> M,U,D"),
    "attention/output": ("self_attn.o_proj.weight", "M,ND -> N,D,M"),
    "attention/query_bias": ("self_attn.q_proj.bias", "ND -> N,D"),
    "attention/key_bias": ("self_attn.k_proj.bias", "UD -> U,D"),
    "attention/value_bias": ("self_attn.v_proj.bias", "UD -> U,D"),
    "attention/output_bias": ("self_attn.o_proj.bias", "M"),
    "attention/query_norm/scale": ("self_attn.q_norm.weight", "D"),
    "attention/key_norm/scale": ("self_attn.k_norm.weight", "D"),
    "attention/sink": ("self_attn.sinks", "N"),
    **gated("dense", "mlp"),
    "sparse/router": ("mlp.gate.weight", "E,M -> M,E"),
    "sparse/selection_bias": ("mlp.gate.e_score_correction_bias", "E"),
    "sparse/experts/up": ("mlp.experts.gate_up_proj", "E,cF,M -> E,M,c,F"),
    "sparse/experts/down": ("mlp.experts.down_proj", "E,M,F -> E,F,M"),
    **gated("sparse/shared", "mlp.shared_experts"),
}

# What other families do otherwise.
NORMS_OF_WHOLE_WIDTH: Rules = {
    "attention/query_norm/scale": ("self_attn.q_norm.weight", "ND -> N,D"),
    "attention/key_norm/scale": ("self_attn.k_norm.weight", "UD -> U,D"),
}
NORMS_OF_OUTPUT = norms(
    attention_output_norm="post_attention_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
NORMS_ON_BOTH_SIDES = NORMS_OF_OUTPUT | norms(
    attention_norm="input_layernorm", mlp_norm="pre_feedforward_layernorm"
)
LATENTS: Rules = {
    "attention/query_down": ("self_attn.q_a_proj.weight", "R,M -> M,R"),
    "attention/query_norm/scale": ("self_attn.q_a_layernorm.weight", "R"),
    "attention/query_up": ("self_attn.q_b_proj.weight", "ND,R -> R,N,D"),
    "attention/kv_down": ("self_attn.kv_a_proj_with_mqa.weight", "[R|P],M -> M,R"),
    "attention/rope_key": ("self_attn.kv_a_proj_with_mqa.weight", "[R|P],M -> M,P"),
    "attention/kv_norm/scale": ("self_attn.kv_a_layernorm.weight", "R"),
    "attention/key_up": ("self_attn.kv_b_proj.weight", "N[D|W],R -> R,N,D"),
    "attention/value_up": ("self_attn.kv_b_proj.weight", "N[D|W],R -> R,N,W"),
    "attention/output": ("self_attn.o_proj.weight", "M,NW -> N,W,M"),
}
ONE_SHARED_EXPERT: Rules = {
    **gated("sparse/shared", "mlp.shared_expert"),
    "sparse/shared_gate": ("mlp.shared_expert_gate.weight", "o,M -> M,o"),
}
BIAS_BESIDE_THE_GATE: Rules = {
    "sparse/selection_bias": ("mlp.e_score_correction_bias", "E"),
}
GPT_OSS: Rules = {
    "sparse/router": ("mlp.router.weight", "E,M -> M,E"),
    "sparse/router_bias": ("mlp.router.bias", "E"),
    # Gate and up alternate, and experts are kept as they multiply from the right.
    "sparse/experts/up": ("mlp.experts.gate_up_proj", "E,M,Fc -> E,M,c,F"),
    "sparse/experts/up_bias": ("mlp.experts.gate_up_proj_bias", "E,Fc -> E,c,F"),
    "sparse/experts/down": ("mlp.experts.down_proj", "E,F,M"),
    "sparse/experts/down_bias": ("mlp.experts.down_proj_bias", "E,M"),
}
LLAMA_4: Rules = {
    **gated("dense", "feed_forward"),
    "sparse/router": ("feed_forward.router.weight", "E,M -> M,E"),
    "sparse/experts/up": ("feed_forward.experts.gate_up_proj", "E,M,cF -> E,M,c,F"),
    "sparse/experts/down": ("feed_forward.experts.down_proj", "E,F,M"),
    **gated("sparse/shared", "feed_forward.shared_expert"),
}
GRANITE: Rules = {
    "sparse/router": ("block_sparse_moe.router.weight", "E,M -> M,E"),
    "sparse/experts/up": ("block_sparse_moe.experts.gate_up_proj", "E,cF,M -> E,M,c,F"),
    "sparse/experts/down": ("block_sparse_moe.experts.down_proj", "E,M,F -> E,F,M"),
}


def read(
    theirs: Mapping[str, np.ndarray], prefix: str, rule: Rule, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns one of our arrays, made of theirs.

    Args:
        theirs: their arrays by name.
        prefix: what stands before the names of the rule.
        rule: names and dims.
        shape: sizes of our dims, from which those of theirs follow.
    Raises:
        KeyError: there is no array of that name.
        ValueError: its shape is not what the rule says.
    """
    names, dims = rule
    arrays = [theirs[prefix + name] for name in names.split(" + ")]
    array = np.stack(arrays) if len(arrays) > 1 else arrays[0]
    try:
        return arranged(array, dims, shape)
    except ValueError as error:
        raise ValueError(
            f"{prefix}{names} of shape {array.shape} is no {dims!r} of {shape}"
        ) from error


def arranged(array: np.ndarray, dims: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array with its dims as the right side of a rule has them."""
    left, _, right = dims.partition(" -> ")
    order = (right or left).split(",")
    sizes = dict(zip(order, shape, strict=True))
    parts = [
        part
        for size, dim in zip(array.shape, left.split(","), strict=True)
        for part in _parts(dim, size, sizes)
    ]
    letters = [letter for letter, _, _ in parts]
    split = array.reshape([room for _, room, _ in parts])
    taken = tuple(slice(start, start + sizes[letter]) for letter, _, start in parts)
    return split[taken].transpose([letters.index(letter) for letter in order])


def _parts(dim: str, size: int, sizes: dict[str, int]) -> list[tuple[str, int, int]]:
    """Takes one dim of theirs apart.

    Returns:
        Of each part our letter, its size there, and where ours begins in it.
    """
    found = re.findall(r"\[(\w)\|(\w)\]|(\w)", dim)
    room = size // math.prod(sizes[letter] for _, _, letter in found if letter)
    parts = []
    for first, second, letter in found:
        if letter:
            parts.append((letter, sizes[letter], 0))
        elif first in sizes:
            parts.append((first, room, 0))
        else:
            parts.append((second, room, room - sizes[second]))
    fits = all(sizes[letter] <= there for letter, there, _ in parts)
    if not fits or math.prod(there for _, there, _ in parts) != size:
        raise ValueError(f"a dim of {size} is no {dim}")
    return parts
