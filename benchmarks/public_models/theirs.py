"""A public model with random weights, and what it makes of tokens."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from benchmarks.public_models import families
from benchmarks.public_models.families import Family
from launch.exchange.theirs import chosen as chosen_of

VERSION = transformers.__version__
_WORDS = {"decoder": "input_ids", "encoder": "input_ids"}
_WORDS_OF_TWO = {"encoder": "input_ids", "decoder": "decoder_input_ids"}


class Computed(NamedTuple):
    """What a model makes of tokens.

    Attributes:
        arrays: its own, by name.
        gradients: those of the loss, by the same names.
        logits_BLV: its logits.
        chosen: whom each token chose, bool[T, E] of each sparse layer, the encoder's
            first; none in a dense model.
    """

    arrays: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    logits_BLV: np.ndarray
    chosen: list[np.ndarray]


def computed(
    family: Family, tokens: Mapping[str, np.ndarray], label_BL: np.ndarray
) -> Computed:
    """Computes what a family's model, drawn at random, makes of tokens.

    Args:
        family: the model.
        tokens: int[B, L] of each stack.
        label_BL: what its logits are to predict; the loss is the mean of all.
    """
    torch.manual_seed(0)
    model = _model(family)
    chosen: list[np.ndarray] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda experts, given: chosen.append(chosen_of(experts, given))
            )
    words = _WORDS if len(tokens) == 1 else _WORDS_OF_TWO
    given = {words[stack]: torch.from_numpy(ids) for stack, ids in tokens.items()}
    logits_BLV = model(**given, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1), torch.from_numpy(label_BL).flatten()
    )
    loss.backward()
    arrays, gradients = {}, {}
    gradient_of = {name: p.grad for name, p in model.named_parameters()}
    seen = set()
    for name, array in model.state_dict().items():
        if array.data_ptr() in seen:
            continue  # another name of an array
        seen.add(array.data_ptr())
        gradient = gradient_of.get(name)  # there is none of what is not learnt so
        arrays[name] = array.numpy()
        gradients[name] = np.zeros_like(arrays[name])
        if gradient is not None:
            gradients[name] = gradient.numpy()
    return Computed(arrays, gradients, logits_BLV.detach().numpy(), chosen)


def _model(family: Family) -> Any:
    """The model, with weights large enough that each one matters."""
    kind = getattr(transformers, f"{family.theirs}{family.head}")
    fields = _fields(family) if len(family.layers) == 1 else family.config
    config = kind.config_class(**fields, attn_implementation="eager")
    model = kind(config).eval()
    if "encoder" in family.layers and not family.ours.get("tie_embeddings"):
        # The class of T5 ties whatever config.json says, unless files do not.
        model.lm_head.weight = torch.nn.Parameter(torch.clone(model.lm_head.weight))
    centred = family.ours.get("norm") == "rms_plus_one"
    for name, parameter in model.named_parameters():
        is_norm = re.search(r"norm|ln_", name, re.IGNORECASE)
        mean = float(is_norm is not None and name.endswith("weight") and not centred)
        torch.nn.init.normal_(parameter, mean, 0.3)
        if name.endswith("Attention.q.weight"):  # T5 does not scale scores
            parameter.data *= config.d_kv**-0.5
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.2)
    return model


def _fields(family: Family) -> dict[str, Any]:
    """Fields of the configuration of a decoder."""
    given = dict(family.config)
    rope = {"rope_type": "default", "rope_theta": families.BASE} | given.pop("rope", {})
    if "qk_rope_head_dim" not in given:
        given["head_dim"] = families.HEAD_DIM
    sizes = {
        "vocab_size": families.VOCAB,
        "hidden_size": families.WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": families.HEADS,
        "num_key_value_heads": families.KV_HEADS,
        "max_position_embeddings": 256,
        "rms_norm_eps": families.EPSILON,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return sizes | given
