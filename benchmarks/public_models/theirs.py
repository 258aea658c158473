"""A public model with random weights, and what it makes of tokens."""

from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.public_models import families
from benchmarks.public_models.families import Family

VERSION = transformers.__version__


def computed(
    family: Family, token_BL: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns the model's arrays, logits_BLV, and whom each token chose.

    The choices are bool, [sparse layers, tokens, E]; there are none in a dense model.
    """
    torch.manual_seed(0)
    model = _model(family)
    chosen: list[np.ndarray] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(
                lambda experts, given: chosen.append(_chosen(experts, given))
            )
    with torch.no_grad():
        logits_BLV = model(torch.from_numpy(token_BL), use_cache=False).logits
    arrays = {name: array.numpy() for name, array in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del arrays["lm_head.weight"]  # the embedding's other name
    return arrays, logits_BLV.numpy(), np.array(chosen, bool)


def _model(family: Family) -> Any:
    """The model, with weights large enough that each one matters."""
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
    kind = getattr(transformers, f"{family.theirs}ForCausalLM")
    config = kind.config_class(**sizes | given, attn_implementation="eager")
    model = kind(config).eval()
    centred = family.ours.get("norm") == "rms_plus_one"
    for name, parameter in model.named_parameters():
        mean = float("norm" in name and not centred)
        torch.nn.init.normal_(parameter, mean, 0.3)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(0, 0.2)
    return model


def _chosen(experts: Any, given: tuple[Any, ...]) -> np.ndarray:
    """Whom each token chose, of what a layer gives its experts."""
    x_TM, *ids = given
    if not ids:
        # Llama 4 gives every expert all tokens, and zeros for those of others.
        x_ETM = x_TM.reshape(experts.num_experts, -1, x_TM.shape[-1])
        return x_ETM.ne(0).any(-1).T.numpy()
    one_hot_TKE = torch.nn.functional.one_hot(ids[0], experts.num_experts)
    return one_hot_TKE.sum(-2).bool().numpy()
