"""Decoding with a cache equals the full forward pass, and draws by the rules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import architecture
from moe.model import decoding, inventory, parameters, transformer
from moe.model.build import build
from moe.model.decoding import NEVER, generate, keep_likely
from moe.model.memories import empty_memories, extend
from moe.settings import ExecutionSettings, ModelSettings, RouterSettings
from moe.testing import MESHES
from moe.testing.jaxprs import equations
from moe.testing.whole_arrays import forward
from partitioning.mesh import make_mesh

B, L, V = 8, 8, 16
VOCABULARY_PIECES = 12  # ids from here to V are never drawn
NUM_TOKENS = 6
SPARSE = ModelSettings(
    vocab_size=V,
    num_layers=2,
    moe_every=1,
    model_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    num_experts=4,
    expert_mlp_dim=12,
    tie_embeddings=False,
)
EXECUTION = ExecutionSettings(transport="all_to_all", dtype="float32", remat="none")
MODELS = {
    "top1": (SPARSE, RouterSettings(num_selected=1), EXECUTION),
    # Two segments, each with a memory of its own; and the transport of "auto".
    "alternating_top2": (
        dataclasses.replace(
            SPARSE,
            num_layers=5,
            first_dense_layers=1,
            moe_every=2,
            norm_place="both",
            embed_scale=1.5,
            residual_scale=0.5,
            logit_scale=2.0,
            extra_mlp="before",
            shared_expert_mlp_dim=4,
            shared_expert_gate=True,
        ),
        RouterSettings(num_selected=2, renormalize="before_drop"),
        dataclasses.replace(EXECUTION, transport="auto"),
    ),
    # Pieces of four tokens are attended in blocks.
    "dense": (
        dataclasses.replace(SPARSE, moe_every=0),
        RouterSettings(),
        dataclasses.replace(EXECUTION, attention_block=4),
    ),
    # Every other layer sees three places back; and what else attention may have.
    "windows": (
        dataclasses.replace(
            SPARSE,
            moe_every=0,
            attention_windows=(3, 0),
            position_layers=(1, 0),
            attention_chunks=(0, 5),
            attention_growth=0.5,
            attention_growth_length=2,
            num_heads=4,
            num_kv_heads=2,
            qk_norm="width",
            rope_fraction=0.5,
            rope_pairs="neighbours",
            attention_sinks=True,
            attention_cap=2.0,
            attention_output_gate=True,
            logit_cap=5.0,
        ),
        RouterSettings(),
        dataclasses.replace(EXECUTION, attention_block=4),
    ),
    # Pieces of six tokens make keys of latents, those of two ask in their space.
    "latent": (
        dataclasses.replace(
            SPARSE,
            moe_every=0,
            attention="latent",
            num_heads=4,
            head_dim=2,
            kv_latent_dim=16,
            rope_head_dim=2,
            value_head_dim=3,
        ),
        RouterSettings(),
        dataclasses.replace(EXECUTION, attention_block=4),
    ),
}


def shapes_of(settings: ModelSettings):
    layers = architecture.describe(settings, RouterSettings())
    return parameters.shapes(inventory.specs(layers), "float32")


@functools.cache
def params_of(name: str):
    """Weights large enough for tokens, positions and experts to matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.5).astype(np.float32),
        shapes_of(MODELS[name][0]),
    )


def model_of(name: str, group_size: int, mesh="d1") -> transformer.Model:
    settings, router, execution = MODELS[name]
    router = dataclasses.replace(router, group_size=group_size)
    return build(settings, router, execution, make_mesh(MESHES[mesh]))


@functools.cache
def compiled_forward(name: str):
    return jax.jit(functools.partial(forward, model_of(name, L)))


def full_forward(name: str, tokens_BL, **features) -> np.ndarray:
    """Logits of all positions from one pass without a cache."""
    batch = {
        "decoder_input_tokens": tokens_BL,
        "decoder_positions": np.tile(np.arange(L, dtype=np.int32), (B, 1)),
        "decoder_segment_ids": np.ones((B, L), np.int32),
        **features,
    }
    rows = np.arange(B, dtype=np.int32)
    return np.asarray(compiled_forward(name)(params_of(name), batch, rows)[0])


@functools.cache
def compiled_piece(name: str, length: int, mesh: str = "d1"):
    return jax.jit(functools.partial(extend, model_of(name, length, mesh)))


@pytest.mark.parametrize(
    ("name", "mesh", "lengths"),
    [
        ("alternating_top2", "d1", (2, 2, 2, 2)),
        ("top1", "d1", (1,) * L),
        ("windows", "d1", (4, 2, 1, 1)),
        ("windows", "d2m4", (4, 4)),  # two devices share a head of keys
        ("latent", "d2m4", (6, 2)),
    ],
)
def test_a_sequence_read_in_pieces_has_the_logits_of_the_full_forward(
    name, mesh, lengths
):
    tokens_BL = np.random.default_rng(1).integers(0, V, (B, L)).astype(np.int32)
    memories, logits, start = empty_memories(model_of(name, L), B, L), [], 0
    for length in lengths:
        piece_BLV, memories = compiled_piece(name, length, mesh)(
            params_of(name),
            tokens_BL[:, start : start + length],
            np.ones((B, length), bool),
            np.int32(start),
            np.zeros(B, np.int32),
            memories,
        )
        logits.append(piece_BLV)
        start += length
    # Logits are of order 1; the two differ in the order of float32 sums.
    np.testing.assert_allclose(
        np.concatenate(logits, axis=1), full_forward(name, tokens_BL), 1e-4, 1e-5
    )


@pytest.mark.fast
@pytest.mark.parametrize("length", [16, 17])
def test_a_long_prompt_is_attended_in_blocks(length):
    settings = dataclasses.replace(SPARSE, moe_every=0)
    execution = dataclasses.replace(EXECUTION, attention_block=16)
    mesh = make_mesh(MESHES["d1"])
    model = build(settings, RouterSettings(), execution, mesh)
    room = 41  # a dimension that nothing else has
    jaxpr = jax.make_jaxpr(functools.partial(extend, model))(
        shapes_of(settings),
        np.zeros((B, length), np.int32),
        np.ones((B, length), bool),
        jnp.int32(0),
        np.zeros(B, np.int32),
        empty_memories(model, B, room),
    )
    scores = [
        v.aval.shape
        for equation in equations(jaxpr)
        for v in equation.outvars
        if v.aval.ndim >= 3 and {length, room} <= set(v.aval.shape[-2:])
    ]
    assert scores == []


@pytest.mark.fast
def test_a_sequence_of_the_length_of_a_block_keeps_no_scores_for_the_way_back():
    length = 37  # that nothing else has

    def kept(block: int) -> list[tuple[int, ...]]:
        settings = dataclasses.replace(SPARSE, moe_every=0)
        execution = dataclasses.replace(EXECUTION, attention_block=block)
        mesh = make_mesh(MESHES["d1"])
        model = build(settings, RouterSettings(), execution, mesh)
        features = ("input_tokens", "positions", "segment_ids")
        ones_BL = np.ones((B, length), np.int32)
        batch = {f"decoder_{name}": ones_BL for name in features}

        def residuals(params):
            def hidden(params):
                return transformer.hidden(model, params, batch, np.arange(B), None)[0]

            return jax.vjp(hidden, params)[1]

        shapes = jax.tree.leaves(jax.eval_shape(residuals, shapes_of(settings)))
        return [x.shape for x in shapes if x.shape[-2:] == (length, length)]

    assert kept(length) == []
    assert kept(length + 1) != []


@functools.cache
def compiled_generate(name: str, mesh: str, temperature: float, **choices):
    return jax.jit(
        functools.partial(
            generate,
            model_of(name, L, mesh),
            num_tokens=NUM_TOKENS,
            vocabulary_size=VOCABULARY_PIECES,
            temperature=temperature,
            **choices,
        )
    )


PROMPT_BL = np.tile(np.array([5, 3, 9, 1], np.int32), (B, 1))


def continue_prompts(
    prompt_BL, length_B, *, name="top1", mesh="d1", temperature=5.0, seed=0, **choices
) -> np.ndarray:
    """Draws after the first tokens of each row."""
    run = compiled_generate(name, mesh, temperature, **choices)
    with jax.set_mesh(make_mesh(MESHES[mesh])):
        tokens_BL = run(
            params_of(name), prompt_BL, np.int32(length_B), jax.random.key(seed)
        )
    assert tokens_BL.shape == (B, NUM_TOKENS)
    assert tokens_BL.dtype == np.int32
    return np.asarray(tokens_BL)


def continue_prompt(length: int, **choices) -> np.ndarray:
    """Draws after the first `length` tokens of the prompt, in every row."""
    return continue_prompts(PROMPT_BL, np.full(B, length), **choices)


def likeliest_tokens(
    name: str, prompt_BL, length_B, drawn_BL, *, first_id=1, start_id=0, **features
) -> list[np.ndarray]:
    """What a full forward pass over prompt and continuation finds likeliest.

    As many tokens of each row as fit into L.
    """
    input_BL = np.zeros((B, L), np.int32)  # causal: what follows is idle
    for input_L, prompt_L, length, drawn_L in zip(
        input_BL, prompt_BL, length_B, drawn_BL, strict=True
    ):
        tokens = [start_id, *prompt_L[: max(length, 0)], *drawn_L][:L]
        input_L[: len(tokens)] = tokens
    logits_BLV = full_forward(name, input_BL, **features)
    likeliest_BL = first_id + logits_BLV[..., first_id:VOCABULARY_PIECES].argmax(-1)
    return [
        likeliest_L[length : length + NUM_TOKENS]
        for likeliest_L, length in zip(likeliest_BL, length_B, strict=True)
    ]


GREEDY = {"name": "top1", "temperature": 0.0}
TOP_K_1 = {"name": "dense", "temperature": 5.0, "top_k": 1, "start_id": 7}


@pytest.mark.parametrize("choices", [GREEDY, TOP_K_1], ids=["temperature_0", "top_k_1"])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_greedy_decoding_takes_the_likeliest_token_of_the_full_forward(choices, length):
    length_B, name = np.full(B, length), choices["name"]
    drawn_BL = continue_prompt(length, **choices)
    start = {"start_id": choices.get("start_id", 0)}
    expected_BL = np.array(
        likeliest_tokens(name, PROMPT_BL, length_B, drawn_BL, **start)
    )
    checked = expected_BL.shape[1]
    assert checked == min(NUM_TOKENS, L - length)
    np.testing.assert_array_equal(drawn_BL[:, :checked], expected_BL)
    assert len(set(drawn_BL[0])) > 1, "a constant continuation proves little"


def random_prompts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of any length, one of them empty and one row without any."""
    rng = np.random.default_rng(seed)
    length_B = rng.permutation([-1, 0, 4, *rng.integers(0, 5, B - 3)])
    return rng.integers(0, V, (B, 4)).astype(np.int32), length_B


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_continued_whatever_the_lengths_of_the_others(seed):
    prompt_BL, length_B = random_prompts(seed)
    drawn_BL = continue_prompts(prompt_BL, length_B, **GREEDY)
    expected = likeliest_tokens("top1", prompt_BL, length_B, drawn_BL)
    for b, length in enumerate(length_B):
        if length < 0:
            assert not drawn_BL[b].any()
            continue
        checked = len(expected[b])
        np.testing.assert_array_equal(drawn_BL[b, :checked], expected[b])
        alone_B = np.where(np.arange(B) == b, length, -1)
        alone_BL = continue_prompts(prompt_BL, alone_B, **GREEDY)
        np.testing.assert_array_equal(drawn_BL[b], alone_BL[b])
    assert len(np.unique(drawn_BL, axis=0)) > 3, "prompts matter"


def test_padding_before_a_prompt_takes_no_slot_of_an_expert(monkeypatch):
    masks = []

    def noting(model, params, id_BL, mask_BL, start, first_B, memories, source, **_):
        masks.append(mask_BL)
        return np.zeros((B, 1, V)), memories

    monkeypatch.setattr(decoding, "extend", noting)
    _, length_B = prompts = random_prompts(0)
    key, choices = jax.random.key(0), {"vocabulary_size": V, "temperature": 0.0}
    generate(model_of("top1", L), None, *prompts, key, num_tokens=1, **choices)
    for mask_L, length in zip(masks[0], length_B, strict=True):
        padding = [False] * (4 - length)
        assert mask_L.tolist() == padding + [True] * (length + 1)


def test_prefixes_are_seen_whole_0_may_be_drawn_and_an_end_is_an_end():
    eos_id, choices = 10, {"name": "dense", "first_id": 0}
    whole = {"temperature": 0.0, "whole_prompt": True, "eos_id": eos_id, **choices}
    ended, drew_0, prefix_matters = [], [], []
    for seed in range(6):
        prompt_BL, length_B = random_prompts(seed)
        drawn_BL = continue_prompts(prompt_BL, length_B, **whole)
        # SeqIO's: the inputs, and one position more.
        prefix_BL = (np.arange(L) <= length_B[:, None]).astype(np.int32)
        expected, causal = (
            likeliest_tokens(
                **choices,
                prompt_BL=prompt_BL,
                length_B=length_B,
                drawn_BL=drawn_BL,
                decoder_causal_attention=p,
            )
            for p in (prefix_BL, np.zeros_like(prefix_BL))
        )
        for b in np.flatnonzero(length_B >= 0):
            (ends,) = np.nonzero(drawn_BL[b] == eos_id)
            stop = ends[0] + 1 if len(ends) else NUM_TOKENS
            ended.append(stop < NUM_TOKENS)
            drew_0.append(0 in drawn_BL[b, :stop])
            stop_seen = min(stop, len(expected[b]))
            prefix_matters.append(np.any((expected[b] != causal[b])[:stop_seen]))
            assert not drawn_BL[b, stop:].any()
            np.testing.assert_array_equal(
                drawn_BL[b, :stop_seen], expected[b][:stop_seen]
            )
    for seen in (ended, drew_0, prefix_matters):
        assert 2 <= sum(seen) < len(seen)


def test_a_seed_draws_the_same_tokens_on_one_device_and_on_eight():
    draw = functools.partial(continue_prompt, 2)
    one = draw()
    np.testing.assert_array_equal(draw(mesh="d4e2"), one)
    assert np.any(draw(seed=1) != one)
    assert len(np.unique(one, axis=0)) == B, "rows draw for themselves"


def test_padding_and_ids_beyond_the_vocabulary_are_never_drawn():
    drawn = np.concatenate([continue_prompt(2, seed=seed) for seed in range(20)])
    # 960 draws from 11 flat choices find every one of them, and no other.
    assert set(drawn.ravel()) == set(range(1, VOCABULARY_PIECES))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        # In order 0.4, 0.3, 0.2, 0.1, with 0, 0.4, 0.7, 0.9 before them.
        (0, 0.75, [1, 2, 3]),
        (0, 0.6, [1, 3]),
        (0, 0.3, [1]),
        (0, 0.0, [1]),  # the likeliest always stays
        (2, 0.75, [1, 3]),  # both rules hold
        (2, 0.3, [1]),
    ],
)
def test_the_likely_tokens_are_these(top_k, top_p, kept):
    logits_BV = np.log([[0.1, 0.4, 0.2, 0.3]]).astype(np.float32)
    likely_BV = keep_likely(logits_BV, top_k=top_k, top_p=top_p)
    expected_V = np.where(np.isin(np.arange(4), kept), logits_BV[0], NEVER)
    np.testing.assert_array_equal(likely_BV[0], expected_V.astype(np.float32))


@pytest.mark.fast
def test_the_whole_distribution_keeps_every_token_however_unlikely():
    # Sums of float32 probabilities reach 1 before the last tokens: a nucleus would
    # leave them out.
    logits_BV = np.random.default_rng(0).normal(size=(4, 5000), scale=6.0)
    logits_BV = logits_BV.astype(np.float32)
    for top_k in (0, 5000):
        likely_BV = keep_likely(logits_BV, top_k=top_k, top_p=1.0)
        np.testing.assert_array_equal(likely_BV, logits_BV)


def test_a_temperature_near_zero_is_greedy():
    tokens_BL = np.random.default_rng(4).integers(1, V, (B, L)).astype(np.int32)
    given = params_of("dense"), tokens_BL, np.full(B, L), jax.random.key(0)
    greedy = compiled_generate("dense", "d1", 0.0)(*given)
    for temperature in (1e-6, 1e-38, 1e-300):
        drawn = compiled_generate("dense", "d1", temperature)(*given)
        np.testing.assert_array_equal(drawn, greedy)
