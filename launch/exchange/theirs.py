"""What `transformers` makes of a few tokens with a public model."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from launch.exchange.family import Family
from launch.exchange.seen import EMBEDDED, Seen, Tokens

VERSION = transformers.__version__


def observe(
    source: Path, architecture: str, family: Family, tokens: Tokens, *, rounds: bool
) -> Seen:
    """Computes in float32 what each layer of a model makes of tokens.

    Args:
        source: folder of the model.
        architecture: its class.
        family: where its layers are.
        tokens: int32[B, L] of each stack.
        rounds: whether parameters are rounded to bfloat16 first.
    """
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    kind = getattr(transformers, architecture)
    config = kind.config_class.from_pretrained(source, local_files_only=True)
    # By the name of its class; what has another of its own is not all read.
    config.model_type = kind.config_class.model_type
    model, found = kind.from_pretrained(
        source,
        config=config,
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",  # the fast one refuses odd widths
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    if drawn := sorted(set(found["missing_keys"]) - _unneeded(model, family)):
        raise ValueError(f"{len(drawn)} arrays would be random, such as {drawn[0]}")
    for parameter in model.parameters() if rounds else ():
        parameter.data = parameter.data.bfloat16().float()
    return observed(model.eval(), family.layers, tokens)


def _unneeded(model: Any, family: Family) -> set[str]:
    """Returns arrays of a model that change nothing that is compared."""
    pattern = family.left_out(family.said(model.config.to_dict()))
    return {
        name
        for name in model.state_dict()
        if re.fullmatch(pattern, family.renamed(name))
    }


def observed(model: Any, layers: Mapping[str, str], tokens: Tokens) -> Seen:
    """Computes what each layer of a loaded model makes of tokens.

    Args:
        model: the model.
        layers: what the names of a layer's arrays begin with, as `Family.layers`.
        tokens: int32[B, L] of each stack.
    """
    streams: dict[str, np.ndarray] = {}
    choices: dict[str, np.ndarray] = {}
    token_count = max(token_BL.shape[1] for token_BL in tokens.values())
    for name, module in model.named_modules():
        if hasattr(module, "expert_capacity"):  # ours are compared without
            module.expert_capacity = token_count
        place = _place(name, layers)
        if place is None:
            continue
        stack, number, rest = place
        at = f"{stack} layer {number}"
        if not rest:
            module.register_forward_hook(_keep_stream(streams, at))
            if not number:
                above = EMBEDDED.format(stack)
                module.register_forward_pre_hook(
                    _keep_input(streams, above), with_kwargs=True
                )
        elif rest.rpartition(".")[2] == "experts":
            module.register_forward_pre_hook(_keep_choices(choices, at))
    given = {
        _WORDS[tuple(tokens)][name]: torch.from_numpy(token_BL.astype(np.int64))
        for name, token_BL in tokens.items()
    }
    with torch.no_grad():
        made = model(**given, **_NO_CACHE[tuple(tokens)])
    logits = getattr(made, "logits", getattr(made, "prediction_logits", None))
    if logits is None:  # of a model without a head
        embedding = model.get_input_embeddings().weight
        logits = made.last_hidden_state @ embedding.T
    return Seen(streams, choices, _flat(logits))


_WORDS = {
    ("decoder",): {"decoder": "input_ids"},
    ("encoder",): {"encoder": "input_ids"},
    ("encoder", "decoder"): {"encoder": "input_ids", "decoder": "decoder_input_ids"},
}
_NO_CACHE: dict[tuple[str, ...], dict[str, Any]] = {
    ("decoder",): {"use_cache": False},
    ("encoder",): {},
    ("encoder", "decoder"): {"use_cache": False},
}


def _place(name: str, layers: Mapping[str, str]) -> tuple[str, int, str] | None:
    """Says of which stack and layer a module is, and its name in that layer.

    A model without a head has no root before its layers.
    """
    for stack, prefix in layers.items():
        root, _, rest = prefix.partition(".")
        for known in (prefix, rest) if root not in layers else (prefix,):
            pattern = re.escape(known.removesuffix(".")).replace(r"\{\}", r"(\d+)")
            if found := re.fullmatch(rf"{pattern}(?:\.(.*))?", name):
                return stack, int(found[1]), found[2] or ""
    return None


def _keep_stream(streams: dict[str, np.ndarray], at: str) -> Callable[..., None]:
    def keep(module: Any, given: Any, made: Any) -> None:
        del module, given
        streams[at] = _flat(made[0] if isinstance(made, tuple) else made)

    return keep


def _keep_input(streams: dict[str, np.ndarray], at: str) -> Callable[..., None]:
    def keep(module: Any, given: Any, named: Any) -> None:
        del module
        streams[at] = _flat(given[0] if given else named["hidden_states"])

    return keep


def _keep_choices(choices: dict[str, np.ndarray], at: str) -> Callable[..., None]:
    def keep(experts: Any, given: Any) -> None:
        choices[at] = chosen(experts, given)

    return keep


def chosen(experts: Any, given: tuple[Any, ...]) -> np.ndarray:
    """Returns whom each token chose, bool[T, E], of what a layer gives its experts."""
    x_TM, *ids = given
    if not ids:
        # Llama 4 gives every expert all tokens, and zeros for those of others.
        x_ETM = x_TM.reshape(experts.num_experts, -1, x_TM.shape[-1])
        return x_ETM.ne(0).any(-1).T.numpy()
    if ids[0].dim() == 3:  # Switch marks them, but for those that found no slot
        return ids[0].bool().any(1).numpy()
    one_hot_TKE = torch.nn.functional.one_hot(ids[0], experts.num_experts)
    return one_hot_TKE.sum(-2).bool().numpy()


def _flat(x: Any) -> np.ndarray:
    return x.detach().float().reshape(-1, x.shape[-1]).numpy()
