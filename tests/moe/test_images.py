"""Patches of images in the first places of rows, compared with loops on cut meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe import architecture
from moe.accounting import count
from moe.constraints import problems
from moe.model import decoding, embedding, inventory, view
from moe.model.build import build
from moe.model.execution import Execution
from moe.model.view import Stream
from moe.settings import (
    ExecutionSettings,
    LossSettings,
    ModelSettings,
    RouterSettings,
    TrainSettings,
)
from moe.testing import MESHES
from moe.testing.whole_arrays import forward
from partitioning import rules
from partitioning.mesh import make_mesh
from partitioning.settings import MeshSettings, PartitionSettings

B, L, V, M, P, SIZE, PATCH, CHANNELS = 4, 16, 24, 8, 6, 4, 2, 3
MODEL = ModelSettings(
    vocab_size=V,
    num_layers=2,
    moe_every=0,
    model_dim=M,
    num_heads=2,
    head_dim=4,
    mlp_dim=12,
    positions="learned",
    max_positions=L,
    image_size=SIZE,
    patch_size=PATCH,
    image_channels=CHANNELS,
)
EXECUTION = ExecutionSettings(dtype="float32", attention_block=0, remat="none")
# Sizes of data, context, expert and model, and what is cut beside the batch.
GRIDS = {
    "alone": ((1, 1, 1, 1), {}),
    "all": ((2, 2, 1, 2), {"fsdp": "data"}),
    "whole_sequence": ((1, 2, 2, 2), {"sequence_parallel": False}),
}


@functools.cache
def problem():
    """Rows of two segments, of which the first of one row is shorter than an image."""
    rng = np.random.default_rng(0)
    segment, position = np.zeros((2, B, L), np.int32)
    for row, cut in enumerate((7, 3, 12, 4)):
        segment[row, :cut], segment[row, cut : L - 1] = 1, 2
        position[row, :cut], position[row, cut:] = np.arange(cut), np.arange(L - cut)
    settings = architecture.describe(MODEL, RouterSettings()).embedding
    params = jax.tree.map(
        lambda spec: rng.normal(size=spec.shape).astype(np.float32),
        embedding.specs(settings),
    )
    return {
        "segment": segment,
        "position": position,
        "id": rng.integers(0, V, (B, L)).astype(np.int32),
        "image": rng.integers(0, 256, (B, SIZE * SIZE * CHANNELS)).astype(np.uint8),
        "d": rng.normal(size=(B, L, M)).astype(np.float32),
    }, params


def expected():
    """Each place of each row by itself, pixel by pixel, in float64."""
    p, params = problem()
    params = jax.tree.map(lambda x: x.astype(np.float64), params)
    x = np.zeros((B, L, M))
    gradient = jax.tree.map(np.zeros_like, params)
    for row, place in np.ndindex(B, L):
        position, d_M = p["position"][row, place], p["d"][row, place]
        if p["segment"][row, place] == 1 and position < (SIZE // PATCH) ** 2:
            top, left = PATCH * (position // 2), PATCH * (position % 2)
            values = [
                p["image"][row, ((top + y) * SIZE + left + z) * CHANNELS + c]
                for y in range(PATCH)
                for z in range(PATCH)
                for c in range(CHANNELS)
            ]
            value_D = np.array(values) / 127.5 - 1
            x[row, place] = value_D @ params["patches"]["kernel"]
            x[row, place] += params["patches"]["bias"]
            gradient["patches"]["kernel"] += np.outer(value_D, d_M)
            gradient["patches"]["bias"] += d_M
        else:
            token = p["id"][row, place]
            x[row, place] = params["embedding"][token] * M**0.5
            gradient["embedding"][token] += d_M * M**0.5
        x[row, place] += params["positions"][position]
        gradient["positions"][position] += d_M
    return x, gradient


@pytest.mark.parametrize("name", GRIDS)
def test_the_first_tokens_are_patches_on_every_mesh(name):
    (data, context, expert, model), partition = GRIDS[name]
    mesh = MeshSettings(data=data, context=context, expert=expert, model=model)
    execution = Execution(EXECUTION, make_mesh(mesh), PartitionSettings(**partition))
    grid, (p, params) = execution.grid, problem()
    s = architecture.describe(MODEL, RouterSettings()).embedding

    def on_device(params, id_BL, position_BL, segment_BL, image_BN):
        row_B = jnp.arange(len(id_BL))
        stream = Stream(
            *(id_BL, position_BL, segment_BL, None, row_B), image_BN=image_BN
        )
        seen = view.of_stream(stream, None, execution)
        return embedding.embed(params, id_BL, seen, s, execution)

    tokens, by_row = rules.spec(["batch", "length"]), rules.spec(["batch", None])
    specs = jax.tree.map(
        lambda spec: rules.spec(spec.axes, grid.table), embedding.specs(s)
    )
    cut = rules.spec(["batch", "piece" if grid.cuts_sequence else "length"])
    embed = grid.run(
        on_device, in_specs=(specs, tokens, tokens, tokens, by_row), out_specs=cut
    )

    def objective(params):
        x = embed(params, p["id"], p["position"], p["segment"], p["image"])
        return jnp.sum(x * p["d"]), x

    gradient, x = jax.jit(jax.grad(objective, has_aux=True))(params)
    wanted_x, wanted = expected()
    np.testing.assert_allclose(x, wanted_x, rtol=1e-5, atol=1e-5)
    for path, array in jax.tree_util.tree_leaves_with_path(wanted):
        name = jax.tree_util.keystr(path)
        if name == "['head']":
            continue
        actual = functools.reduce(lambda tree, key: tree[key.key], path, gradient)
        np.testing.assert_allclose(actual, array, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_drawing_after_an_image_sees_what_training_does(bidirectional):
    rng = np.random.default_rng(1)
    model = build(MODEL, RouterSettings(), EXECUTION, make_mesh(MESHES["d1"]))
    params = inventory.draw(model.layers, jax.random.key(0), "float32")
    image = rng.integers(0, 256, (2, SIZE * SIZE * CHANNELS)).astype(np.uint8)
    patches, text = 4, rng.integers(1, V, (2, 5)).astype(np.int32)
    lengths = np.array([9, 7])  # the second has 3 tokens of text
    # Rows with more room than there are positions: padding stands before prompts.
    room = np.zeros((2, L), np.int32)
    prompt = np.concatenate([np.zeros((2, patches), np.int32), text], axis=1)
    place = np.arange(10)
    batch = {
        "decoder_input_tokens": np.concatenate([prompt[:, :1] * 0, prompt], axis=1),
        "decoder_positions": np.stack([place] * 2).astype(np.int32),
        "decoder_segment_ids": (place <= lengths[:, None]).astype(np.int32),
        "decoder_images": image,
    }
    if bidirectional:
        batch["decoder_causal_attention"] = (place < [[patches]] * 2).astype(np.int32)
    row_B = jnp.arange(2)
    logits_BLV, _ = jax.jit(lambda p, b: forward(model, p, b, row_B))(params, batch)
    begun = jax.jit(
        lambda p, image: decoding.begin(
            *(model, p, np.concatenate([prompt, room], axis=1)),
            *(lengths, None, image),
            num_tokens=2,
            whole_prompt=bidirectional,
        )
    )
    drawn = begun(params, image).logits_BV
    np.testing.assert_allclose(drawn, logits_BLV[[0, 1], lengths], rtol=0, atol=1e-5)
    other = begun(params, 255 - image).logits_BV
    assert np.abs(other - drawn).max() > 1e-2


@pytest.mark.fast
def test_patches_cost_their_own_places_alone():
    layers = architecture.describe(MODEL, RouterSettings())
    without = dataclasses.replace(MODEL, image_size=0)
    plain = count(architecture.describe(without, RouterSettings()), L)
    found = count(layers, L)
    kernel = PATCH * PATCH * CHANNELS * M
    assert found.total - plain.total == kernel + M
    # 4 of 16 places meet the kernel.
    assert found.products - plain.products == kernel // 4


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": -1}, "IMAGE_SIZE = -1: 0 has no images"),
        ({"patch_size": 3}, "PATCH_SIZE = 3 does not divide IMAGE_SIZE = 4"),
        ({"patch_size": 0}, "PATCH_SIZE = 0 does not divide IMAGE_SIZE = 4"),
        ({"patch_size": 1}, "a row of 16 tokens has no room for text after the 16"),
        ({"image_channels": 0}, "IMAGE_CHANNELS = 0: a pixel has 1 number at least"),
        ({"image_size": 0}, "PATCH_SIZE = 2 means nothing to IMAGE_SIZE = 0"),
        (
            {"image_size": 0, "patch_size": 16, "image_channels": 1},
            "IMAGE_CHANNELS = 1 means nothing to IMAGE_SIZE = 0: leave it at 3",
        ),
        ({"shape": "encoder"}, "IMAGE_SIZE = 4 means nothing to ARCHITECTURE ="),
    ],
)
def test_bad_values_are_refused(changes, said):
    def found(model, family="token_choice"):
        router = RouterSettings(family, group_size=4)
        return problems(
            *(model, router, EXECUTION, LossSettings()), TrainSettings(1), length=L
        )

    assert not found(MODEL)
    assert any(said in line for line in found(dataclasses.replace(MODEL, **changes)))
    sparse = dataclasses.replace(MODEL, moe_every=2)
    assert any("goes by the ids of tokens" in line for line in found(sparse, "hashed"))
