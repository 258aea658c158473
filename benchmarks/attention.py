"""Attention of published models, as `transformers` computes it, beside ours.

    pip install -e '.[bench]'
    python -m benchmarks.attention

A layer of each family, of 4 heads of 16 numbers that share 2 of keys, with random
weights, on 2 rows of 12 tokens in float32: no weights are downloaded. Frequencies are
chosen so that all that is scaled differs within a row. Prints the largest difference
of outputs over the largest output; exits with 1 where one is above 1e-5.
"""

import importlib.util
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe.model import view
from moe.model.attention import heads, latent
from moe.model.execution import Execution
from moe.model.view import Stream
from moe.settings import (
    ExecutionSettings,
    HeadsSettings,
    LatentSettings,
    NormSettings,
    PositionSettings,
)
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings

B, L, M, N, U, D = 2, 12, 64, 4, 2, 16
BASE, EPSILON = 100.0, 1e-3
RMS = NormSettings("rms", EPSILON)
SCALED = {"factor": 4.0, "original_length": 64}
THEIRS_SCALED = {"factor": 4.0, "original_max_position_embeddings": 64}


def rotary(**settings: Any) -> PositionSettings:
    """Rotary positions with a base that suits short rows."""
    return PositionSettings("rotary", rotary_base=BASE, **settings)


def ours(**settings: Any) -> HeadsSettings:
    """A kind of attention, of the sizes above."""
    return HeadsSettings(N, U, D, norm=settings.pop("norm", RMS), **settings)


Settings = HeadsSettings | LatentSettings

# By family: the class of `transformers`, its configuration, and the same in our words.
# What is in "rope" are its `rope_parameters`.
CASES: dict[str, tuple[str, dict[str, Any], Settings]] = {
    "qwen3_moe": ("Qwen3Moe", {}, ours(qk_norm="head", positions=rotary())),
    "olmoe": ("Olmoe", {}, ours(qk_norm="width", positions=rotary())),
    "glm4_moe": (
        "Glm4Moe",
        {"rope": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.5}
        | {"attention_bias": True, "use_qk_norm": True},
        ours(qk_norm="head", biases=True, positions=rotary(fraction=0.5)),
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {"rope": {"partial_rotary_factor": 0.5}, "rotary_dim": 8},
        ours(qk_norm="width", positions=rotary(fraction=0.5)),
    ),
    "qwen3_next": (
        "Qwen3Next",
        {"rope": {"partial_rotary_factor": 0.25}, "layer_types": ["full_attention"]},
        ours(
            norm=NormSettings("rms_plus_one", EPSILON),
            qk_norm="head",
            gated=True,
            positions=rotary(fraction=0.25),
        ),
    ),
    "gpt_oss": (
        "GptOss",
        {
            "rope": {"rope_type": "yarn", "beta_fast": 8.0, "beta_slow": 1.0}
            | {"truncate": False, **THEIRS_SCALED},
            "sliding_window": 5,
            "layer_types": ["sliding_attention"],
        },
        ours(
            biases=True,
            output_bias=True,
            sinks=True,
            window=5,
            positions=rotary(scaling="yarn", fast_turns=8.0, truncate=False, **SCALED),
        ),
    ),
    "llama, linear": (
        "Llama",
        {"rope": {"rope_type": "linear", "factor": 3.0}},
        ours(positions=rotary(scaling="linear", factor=3.0)),
    ),
    "llama, yarn": (
        "Llama",
        {"rope": {"rope_type": "yarn", "beta_fast": 8.0, **THEIRS_SCALED}},
        ours(positions=rotary(scaling="yarn", fast_turns=8.0, **SCALED)),
    ),
    "llama, by parts": (
        "Llama",
        {
            "rope": {"rope_type": "llama3", "low_freq_factor": 1.0}
            | {"high_freq_factor": 4.0, **THEIRS_SCALED}
        },
        ours(positions=rotary(scaling="by_parts", fast_turns=4.0, **SCALED)),
    ),
    "llama4": (
        "Llama4Text",
        {"use_qk_norm": True},
        ours(qk_norm="unit", positions=rotary(pairs="neighbours")),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "rope": {"rope_type": "yarn", "beta_fast": 8.0, **THEIRS_SCALED}
            | {"mscale": 0.7, "mscale_all_dim": 0.7},
            "rope_interleave": True,
            "q_lora_rank": 24,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": D,
            "qk_rope_head_dim": 8,
            "v_head_dim": 20,
        },
        LatentSettings(
            N,
            D,
            rope_dim=8,
            value_dim=20,
            kv_latent=12,
            query_latent=24,
            positions=rotary(
                scaling="yarn",
                fast_turns=8.0,
                attention_factor=1 + 0.07 * math.log(4.0),
                pairs="neighbours",
                **SCALED,
            ),
        ),
    ),
    "llama4, no positions": (
        "Llama4Text",
        {"no_rope_layers": [0], "floor_scale": 3, "attn_scale": 0.5},
        ours(growth=0.5, growth_length=3),
    ),
}


def main() -> None:
    """Compares every family, and prints a line for each."""
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("this compares with transformers: pip install -e '.[bench]'")
    import transformers

    print(
        f"transformers {transformers.__version__}: difference over the largest output"
    )
    worst = 0.0
    for name, (prefix, config, settings) in CASES.items():
        weights, x_BLM, theirs_BLM = attended(name.split(",")[0], prefix, config)
        if isinstance(settings, LatentSettings):
            w = named_latents(weights, settings)
        else:
            w = named(weights, settings)
        ours_BLM = run(w, x_BLM, settings)
        largest = np.abs(theirs_BLM).max()
        difference = float(np.abs(ours_BLM - theirs_BLM).max() / largest)
        worst = max(worst, difference)
        print(f"{name:22s} {difference:.1e}")
    raise SystemExit(worst > 1e-5)


def attended(
    family: str, prefix: str, config: dict[str, Any]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Returns weights, activations, and what a layer of theirs makes of them."""
    import torch

    torch.manual_seed(0)
    folder = "llama4" if prefix == "Llama4Text" else family
    theirs: Any = importlib.import_module(
        f"transformers.models.{folder}.modeling_{folder}"
    )
    settings: Any = importlib.import_module(
        f"transformers.models.{folder}.configuration_{folder}"
    )
    given = dict(config)
    rope = {"rope_type": "default", "rope_theta": BASE} | given.pop("rope", {})
    made = getattr(settings, f"{prefix}Config")(
        hidden_size=M,
        num_attention_heads=N,
        num_key_value_heads=N if "q_lora_rank" in given else U,
        **({} if "q_lora_rank" in given else {"head_dim": D}),
        num_hidden_layers=1,
        max_position_embeddings=256,
        rms_norm_eps=EPSILON,
        rope_parameters=rope,
        attn_implementation="eager",
        **given,
    )
    layer = getattr(theirs, f"{prefix}Attention")(made, layer_idx=0).eval()
    for name, parameter in layer.named_parameters():
        torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
    x_BLM, place_L = torch.randn(B, L, M), torch.arange(L)
    position_BL = place_L.expand(B, L)
    apart_LL = place_L[:, None] - place_L
    seen_LL = (apart_LL >= 0) & (apart_LL < given.get("sliding_window", L))
    mask_LL = torch.where(seen_LL, 0.0, torch.finfo(torch.float32).min)
    embedded = getattr(theirs, f"{prefix}RotaryEmbedding")(made)(x_BLM, position_BL)
    with torch.no_grad():
        y_BLM = layer(
            hidden_states=x_BLM,
            position_embeddings=embedded,
            attention_mask=mask_LL.expand(B, 1, L, L),
        )[0]
    weights = {n: p.detach().numpy() for n, p in layer.named_parameters()}
    return weights, x_BLM.numpy(), y_BLM.numpy()


def named(theirs: dict[str, np.ndarray], s: HeadsSettings) -> dict[str, Any]:
    """Returns a layer's weights as `heads.specs` names and shapes them."""
    found: dict[str, Any] = {}
    letters = {"query": ("q", N), "key": ("k", U), "value": ("v", U)}
    for name, (letter, number) in letters.items():
        matrix = theirs[f"{letter}_proj.weight"].T.reshape(M, number, -1)
        found[name] = matrix[..., :D]
        if matrix.shape[-1] == 2 * D:
            found["gate"] = matrix[..., D:]
        if s.biases:
            found[f"{name}_bias"] = theirs[f"{letter}_proj.bias"].reshape(number, D)
        scale = theirs.get(f"{letter}_norm.weight")
        if scale is not None:
            shape = (number, D) if s.qk_norm == "width" else (D,)
            found[f"{name}_norm"] = {"scale": scale.reshape(shape)}
    found["output"] = theirs["o_proj.weight"].T.reshape(N, D, M)
    if s.output_bias:
        found["output_bias"] = theirs["o_proj.bias"]
    if s.sinks:
        found["sink"] = theirs["sinks"]
    return found


def named_latents(theirs: dict[str, np.ndarray], s: LatentSettings) -> dict[str, Any]:
    """Returns a layer's weights as `latent.specs` names and shapes them."""
    down = theirs["kv_a_proj_with_mqa.weight"].T
    up = theirs["kv_b_proj.weight"].T.reshape(s.kv_latent, N, -1)
    return {
        "query_down": theirs["q_a_proj.weight"].T,
        "query_norm": {"scale": theirs["q_a_layernorm.weight"]},
        "query_up": theirs["q_b_proj.weight"].T.reshape(s.query_latent, N, -1),
        "kv_down": down[:, : s.kv_latent],
        "rope_key": down[:, s.kv_latent :],
        "kv_norm": {"scale": theirs["kv_a_layernorm.weight"]},
        "key_up": up[..., : s.head_dim],
        "value_up": up[..., s.head_dim :],
        "output": theirs["o_proj.weight"].T.reshape(N, s.value_dim, M),
    }


def run(w: dict[str, Any], x_BLM: np.ndarray, s: Settings) -> np.ndarray:
    """Attends on one device, with all scores held."""
    settings = ExecutionSettings(dtype="float32", attention_block=0)
    execution = Execution(settings, make_mesh(MeshSettings()))
    segment_BL = jnp.ones((B, L), jnp.int32)
    position_BL = jnp.broadcast_to(jnp.arange(L), (B, L))
    stream = Stream(segment_BL, position_BL, segment_BL, None, jnp.arange(B))
    seen = view.of_stream(stream, None, execution)
    given = jnp.asarray(x_BLM), seen, None, s, None, jnp.zeros((), int), execution
    kind: Any = latent if isinstance(s, LatentSettings) else heads
    return np.asarray(kind.apply(w, *given)[0])


if __name__ == "__main__":
    main()
