"""An encoder and a decoder, and one alone, compared with loops; on every mesh.

The oracle is written token by token, head by head, in float64.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe.model import beam, decoding, inventory
from moe.model.build import build
from moe.model.memories import Encoded
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
)
from moe.testing import MESHES
from moe.testing.whole_arrays import forward
from moe.training import losses
from partitioning.mesh import make_mesh

B, T, L, M, V, E = 4, 16, 8, 8, 24, 4
TWO = ModelSettings(
    shape="encoder_decoder",
    vocab_size=V,
    num_layers=2,
    num_encoder_layers=2,
    model_dim=M,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=12,
    activation="geglu",
    num_experts=E,
    expert_mlp_dim=8,
    positions="relative",
    relative_buckets=8,
    relative_max_distance=12,
    tie_embeddings=True,
)
BERT = dataclasses.replace(
    TWO,
    shape="encoder",
    num_encoder_layers=0,
    activation="gelu_exact",
    positions="learned",
    max_positions=T,
    norm="layer",
    norm_place="after",
    norm_epsilon=1e-3,
    mlp_biases=True,
    attention_biases=True,
    attention_output_bias=True,
    token_types=2,
    embedding_norm=True,
    output_transform=True,
    output_bias=True,
)
# Norms on both sides, factors, a gated shared expert, and a dense sublayer beside the
# experts.
GEMMA = dataclasses.replace(
    TWO,
    shape="decoder",
    num_encoder_layers=0,
    norm="rms_plus_one",
    norm_place="both",
    embed_scale=1.5,
    residual_scale=0.7,
    logit_scale=0.6,
    shared_expert_mlp_dim=6,
    shared_expert_gate=True,
    extra_mlp="after",
)
OLMO = dataclasses.replace(
    GEMMA, norm="rms", norm_place="output", residual_scale=1.0, extra_mlp="before"
)
MODELS = {"two": TWO, "bert": BERT}
ALL = MODELS | {"gemma": GEMMA, "olmo": OLMO}
# Nothing drops, and each token's expert is its own choice, whatever groups there are.
ROUTER = RouterSettings(group_size=4, capacity_factor=0.0)
EXECUTION = ExecutionSettings(dtype="float32", attention_block=0)


@functools.cache
def model_of(name: str, mesh: str = "d1", block: int = 0):
    execution = dataclasses.replace(EXECUTION, attention_block=block)
    return build(ALL[name], ROUTER, execution, make_mesh(MESHES[mesh]))


@functools.cache
def params_of(name: str):
    """Parameters, moved a little so that no bias is zero and no scale one."""
    params = inventory.draw(model_of(name).layers, jax.random.key(1), "float32")
    draw = np.random.default_rng(2)
    return jax.tree.map(
        lambda x: np.asarray(x) + 0.1 * draw.normal(size=x.shape).astype(np.float32),
        params,
    )


def side(name: str, length: int, draw) -> dict[str, np.ndarray]:
    """Packed rows: segments of several lengths, then padding."""
    segment, position = np.zeros((2, B, length), np.int32)
    for row in range(B):
        cuts = np.sort(draw.choice(np.arange(1, length), 2, replace=False))
        for number, (a, b) in enumerate(zip([0, *cuts[:1]], cuts, strict=True)):
            segment[row, a:b] = number + 1
            position[row, a:b] = np.arange(b - a)
    tokens = draw.integers(1, V, (B, length)) * (segment > 0)
    return {
        f"{name}_input_tokens": tokens.astype(np.int32),
        f"{name}_segment_ids": segment,
        f"{name}_positions": position,
    }


@functools.cache
def batch_of(name: str):
    draw = np.random.default_rng(0)
    if name in ("gemma", "olmo"):
        return side("decoder", L, draw)
    if name == "bert":
        types = draw.integers(0, 2, (B, T)).astype(np.int32)
        return side("encoder", T, draw) | {"encoder_token_types": types}
    return side("encoder", T, draw) | side("decoder", L, draw)


# ------------------------------------------------------------------------- the oracle


def normalised(w, x, settings):
    x = np.asarray(x, np.float64)
    if settings.norm == "layer":
        x = x - np.mean(x)
    epsilon = settings.norm_epsilon or 1e-6
    scale = w["scale"] + (1 if settings.norm == "rms_plus_one" else 0)
    x = x / math.sqrt(np.mean(x * x) + epsilon) * scale
    return x + w["bias"] if settings.norm == "layer" else x


def gelu(x, exact):
    if exact:
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bucket(distance, two_sided, buckets=8, most=12):
    """The query's place less the key's; T5's words, one number at a time."""
    base = 0
    if two_sided:
        buckets //= 2
        base, distance = (buckets if distance < 0 else 0), abs(distance)
    distance, exact = max(distance, 0), buckets // 2
    if distance < exact:
        return base + distance
    share = math.log(distance / exact) / math.log(most / exact)
    return base + min(exact + int(share * (buckets - exact) + 1e-12), buckets - 1)


def attended(w, x_LM, segment_L, y_TM, segment_T, *, causal, table, settings):
    """Each token of x looks at each of y that it may see; zero where there is none."""
    shared_by, out = settings.num_heads // settings.num_kv_heads, np.zeros_like(x_LM)
    query, key, value = (
        np.einsum("lm,mnd->lnd", source, w[name]) + w.get(f"{name}_bias", 0)
        for source, name in ((x_LM, "query"), (y_TM, "key"), (y_TM, "value"))
    )
    for i in range(len(x_LM)):
        seen = [
            j
            for j in range(len(y_TM))
            if segment_L[i] == segment_T[j] and (not causal or j <= i)
        ]
        mixed = np.zeros((settings.num_heads, settings.head_dim))
        for n in range(settings.num_heads if seen else 0):
            scores = np.array(
                [query[i, n] @ key[j, n // shared_by] / 2.0 for j in seen]  # √D
            )
            if table is not None:
                scores += [table[bucket(i - j, not causal), n] for j in seen]
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            for weight, j in zip(weights, seen, strict=True):
                mixed[n] += weight * value[j, n // shared_by]
        out[i] = np.einsum("nd,ndm->m", mixed, w["output"]) + w.get("output_bias", 0)
    return out


def fed(w, x_M, settings):
    """A feed-forward, gated or not."""
    up = np.tensordot(x_M, w["up"], 1) + w.get("up_bias", 0)
    if settings.activation == "geglu":
        hidden = gelu(up[0], False) * up[1]
    else:
        hidden = gelu(up, True)
    return hidden @ w["down"] + w.get("down_bias", 0)


def routed(w, x_M, settings):
    """The best expert, weighed by its probability (Switch); and all probabilities."""
    logits = x_M @ w["router"]
    probability = np.exp(logits - logits.max()) / np.sum(np.exp(logits - logits.max()))
    best = int(np.argmax(logits))
    own = {name: array[best] for name, array in w["experts"].items()}
    y_M = probability[best] * fed(own, x_M, settings)
    if "shared" in w:
        gate = 1 / (1 + math.exp(-(x_M @ w["shared_gate"][:, 0])))
        y_M = y_M + gate * fed(w["shared"], x_M, settings)
    return y_M, probability


def layer_in_loops(w, x, segment_L, stack, table, source, settings, seen):
    """Attention, maybe to the source, and a feed-forward or experts.

    What the router makes of each real token is added to `seen` of the stack.
    """
    where, kinds = settings.norm_place, ["attention", "cross", "dense", "sparse"]
    if settings.extra_mlp == "after":
        kinds = ["attention", "sparse", "dense"]

    def norm(x, own):
        return np.stack([normalised(own, token, settings) for token in x])

    for kind in kinds:
        if kind not in w:
            continue
        given = norm(x, w[kind]["norm"]) if where in ("before", "both") else x
        if kind in ("attention", "cross"):
            y = attended(
                *(w[kind], given, segment_L),
                *((given, segment_L) if kind == "attention" else source),
                causal=kind == "attention" and stack == "decoder",
                table=table if kind == "attention" else None,
                settings=settings,
            )
        elif kind == "dense":
            y = np.stack([fed(w[kind], token, settings) for token in given])
        else:
            y = np.zeros_like(given)
            for place in np.flatnonzero(segment_L):
                y[place], probability = routed(w[kind], given[place], settings)
                seen.setdefault(stack, []).append(probability)
        if where in ("both", "output"):
            y = norm(y, w[kind]["output_norm"])
        x = x + settings.residual_scale * y
        x = norm(x, w[kind]["norm"]) if where == "after" else x
    return x


def stack_in_loops(stack, params, row, source, settings, seen):
    """The output of a stack for one row, normalised: a dense layer and a sparse one."""
    segment_L = row[f"{stack}_segment_ids"]
    scale = settings.embed_scale or math.sqrt(M)
    x = params["embedding"][row[f"{stack}_input_tokens"]] * scale
    if "positions" in params:
        x = x + params["positions"][row["encoder_positions"]]
        x = x + params["token_types"][row["encoder_token_types"]]
        w = params["embedding_norm"]
        x = np.stack([normalised(w, token, settings) for token in x])
    for block in params[stack]["layers"][0]:
        w = jax.tree.map(lambda array: array[0], block)
        table = params[stack].get("distance")
        x = layer_in_loops(w, x, segment_L, stack, table, source, settings, seen)
    if "norm" in params[stack]:
        own = params[stack]["norm"]
        x = np.stack([normalised(own, token, settings) for token in x])
    return x, segment_L


@functools.cache
def in_loops(name: str) -> tuple[np.ndarray, dict]:
    """Logits of each row; and each stack's router probabilities of each token."""
    settings, logits, seen = ALL[name], [], {}
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params_of(name))
    for number in range(B):
        row = {feature: array[number] for feature, array in batch_of(name).items()}
        source = None
        for stack in ("encoder", "decoder"):
            if stack in params:
                source = stack_in_loops(stack, params, row, source, settings, seen)
        x, _ = source
        if "transform" in params:
            w = params["transform"]
            x = gelu(x @ w["kernel"] + w["bias"], True)
            x = np.stack([normalised(w["norm"], token, settings) for token in x])
        logit_LV = x @ params["embedding"].T + params.get("output_bias", 0)
        logits.append(settings.logit_scale * logit_LV)
    return np.stack(logits), seen


# -------------------------------------------------------------------------- the tests


@functools.cache
def outputs_of(name: str, mesh: str = "d1", block: int = 0):
    model = model_of(name, mesh, block)
    return jax.jit(lambda p, b: forward(model, p, b, jnp.arange(B)))(
        params_of(name), batch_of(name)
    )


def logits_of(name: str, mesh: str = "d1", block: int = 0) -> np.ndarray:
    return np.asarray(outputs_of(name, mesh, block)[0])


def scored(name: str) -> np.ndarray:
    stack = "encoder" if name == "bert" else "decoder"
    return batch_of(name)[f"{stack}_segment_ids"] > 0


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("two", "d1"), ("bert", "d1"), ("gemma", "d2e2m2"), ("olmo", "d1")],
)
def test_logits_agree_with_loops(name, mesh):
    expected, _ = in_loops(name)
    np.testing.assert_allclose(
        logits_of(name, mesh)[scored(name)], expected[scored(name)], atol=3e-5
    )
    assert np.std(expected[scored(name)]) > 0.3


@pytest.mark.parametrize("name", MODELS)
def test_the_balance_loss_is_the_mean_over_the_layers_of_both_stacks(name):
    _, seen = in_loops(name)
    expected = []
    for probability_SE in map(np.stack, seen.values()):
        first_S = np.argmax(probability_SE, axis=1)
        expected.append(
            E
            * sum(np.mean(first_S == e) * probability_SE[:, e].mean() for e in range(E))
        )
    assert list(seen) == {"two": ["encoder", "decoder"], "bert": ["encoder"]}[name]
    # Another mean than either stack's own: a lost stack shows.
    assert name == "bert" or abs(expected[0] - expected[1]) > 0.01
    settings = LossSettings(balance_scope="global", over_layers="mean")
    zero = jnp.zeros(())
    sums = losses.Sums(
        **{
            f.name: zero
            for f in dataclasses.fields(losses.Sums)
            if f.name not in ("router", "ahead")
        },
        router=tuple(
            losses.router_totals(sums, B, settings) for sums in outputs_of(name)[1]
        ),
    )
    _, metrics = losses.total(sums, settings)
    np.testing.assert_allclose(metrics["loss/balance"], np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_attention_change_nothing(name):
    np.testing.assert_allclose(
        logits_of(name, block=3)[scored(name)], logits_of(name)[scored(name)], atol=2e-5
    )


@pytest.mark.parametrize("name", MODELS)
def test_other_segments_and_padding_change_nothing_bit_for_bit(name):
    batch, draw = dict(batch_of(name)), np.random.default_rng(3)
    kept = {}
    for stack in ("encoder", "decoder"):
        if f"{stack}_segment_ids" in batch:
            segment = batch[f"{stack}_segment_ids"]
            other = draw.integers(1, V, segment.shape).astype(np.int32)
            tokens = batch[f"{stack}_input_tokens"]
            batch[f"{stack}_input_tokens"] = np.where(segment == 1, tokens, other)
            kept = segment == 1
    model = model_of(name)
    logits = jax.jit(lambda p, b: forward(model, p, b, jnp.arange(B))[0])(
        params_of(name), batch
    )
    np.testing.assert_array_equal(np.asarray(logits)[kept], logits_of(name)[kept])
    assert np.any(np.asarray(logits)[~kept] != logits_of(name)[~kept])


# ---------------------------------------------------------------------------- drawing

EOS, TOKENS, ALPHA = 6, 6, 0.7
LENGTHS = np.array([T, 11, 1, 7], np.int32)


@functools.cache
def given():
    """What the encoder reads: rows of different lengths, padded with anything."""
    return np.random.default_rng(5).integers(1, V, (B, T)).astype(np.int32)


def encoded() -> Encoded:
    return Encoded(jnp.asarray(LENGTHS), jnp.asarray(given()))


@functools.cache
def whole_model():
    model = model_of("two")
    return jax.jit(
        lambda p, b: jax.nn.log_softmax(forward(model, p, b, jnp.arange(B))[0])
    )


def log_probabilities(drawn_BL: np.ndarray) -> np.ndarray:
    """Log-softmax for every next token, by the whole model at once; [B, L, V]."""
    real = (np.arange(T) < LENGTHS[:, None]).astype(np.int32)
    shifted = np.zeros((B, L), np.int32)
    shifted[:, 1:] = drawn_BL[:, : L - 1]
    batch = {
        "encoder_input_tokens": given() * real,
        "encoder_segment_ids": real,
        "encoder_positions": np.arange(T, dtype=np.int32) * real,
        "decoder_input_tokens": shifted,
        "decoder_segment_ids": np.ones((B, L), np.int32),
        "decoder_positions": np.tile(np.arange(L, dtype=np.int32), (B, 1)),
    }
    return np.asarray(whole_model()(params_of("two"), batch))


NOTHING = jnp.zeros((B, 1), jnp.int32), jnp.zeros(B, jnp.int32)


@pytest.mark.parametrize("mesh", ["d1", "d2e2m2"])
def test_greedy_tokens_are_those_of_the_whole_model(mesh):
    draw = functools.partial(
        decoding.generate,
        model_of("two", mesh),
        num_tokens=TOKENS,
        vocabulary_size=V,
        temperature=0.0,
    )
    drawn = np.asarray(
        jax.jit(draw)(params_of("two"), *NOTHING, jax.random.key(0), encoded())
    )
    padded = np.pad(drawn, ((0, 0), (0, L - TOKENS)))
    log_p = log_probabilities(padded)[:, :TOKENS].copy()
    log_p[..., 0] = -np.inf
    np.testing.assert_array_equal(drawn, log_p.argmax(-1))
    assert len(np.unique(drawn, axis=0)) > 1, "inputs matter"


def beams_in_loops(K: int) -> tuple[list[list[int]], list[float]]:
    """The best continuation of each row, hypothesis by hypothesis."""
    going = [[(0.0, [])] for _ in range(B)]
    ended: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
    for _ in range(TOKENS):
        found: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
        for k in range(max(len(row) for row in going)):
            drawn = np.zeros((B, L), np.int32)
            for b, row in enumerate(going):
                ids = row[min(k, len(row) - 1)][1]
                drawn[b, : len(ids)] = ids
            log_p = log_probabilities(drawn)
            for b, row in enumerate(going):
                if k < len(row):
                    total, ids = row[k]
                    found[b] += [
                        (total + float(log_p[b, len(ids), v]), [*ids, v])
                        for v in range(1, V)
                    ]
        for b in range(B):
            best = sorted(found[b], key=lambda one: -one[0])[: 2 * K]
            ended[b] += [
                (total / ((5 + len(ids)) / 6) ** ALPHA, ids)
                for total, ids in best
                if ids[-1] == EOS
            ]
            ended[b] = sorted(ended[b], key=lambda one: -one[0])[:K]
            going[b] = [one for one in best if one[1][-1] != EOS][:K]
    chosen = []
    for b in range(B):
        cut_off = [(t / ((5 + TOKENS) / 6) ** ALPHA, ids) for t, ids in going[b]]
        chosen.append((ended[b] or cut_off)[0])
    return [ids for _, ids in chosen], [score for score, _ in chosen]


@pytest.mark.parametrize("mesh", ["d1", pytest.param("d2e2m2", marks=pytest.mark.slow)])
def test_beams_are_those_of_loops_over_hypotheses(mesh):
    K = 3
    search = functools.partial(
        beam.search,
        model_of("two", mesh),
        num_beams=K,
        num_tokens=TOKENS,
        vocabulary_size=V,
        length_penalty=ALPHA,
        eos_id=EOS,
    )
    tokens_BKT, score_BK = jax.jit(search)(params_of("two"), *NOTHING, encoded())
    expected, scores = beams_in_loops(K)
    for b in range(B):
        ids = [*expected[b], *[0] * (TOKENS - len(expected[b]))]
        assert np.asarray(tokens_BKT)[b, 0].tolist() == ids
    np.testing.assert_allclose(score_BK[:, 0], scores, atol=2e-5)
    assert any(ids[-1] == EOS for ids in expected)
    assert (np.diff(np.asarray(score_BK), axis=1) <= 0).all()
