"""Flat words become layers: which are sparse, what repeats, where each is found."""

import dataclasses

import pytest

from moe import architecture
from moe.layers import Layers, Stack
from moe.rules.layers import layer_problems
from moe.settings import ModelSettings, RouterSettings
from moe.shortening import shortened

pytestmark = pytest.mark.fast

MODEL = ModelSettings(
    vocab_size=32, num_layers=7, model_dim=8, num_heads=2, head_dim=4, mlp_dim=16
)
ROUTER = RouterSettings()


def layers_of(**changes) -> Layers:
    return architecture.describe(dataclasses.replace(MODEL, **changes), ROUTER)


def stack_of(**changes) -> Stack:
    return layers_of(**changes).decoder


def written(stack: Stack) -> str:
    """Each layer's last sublayer, segment by segment: "d" or "s"."""
    return " ".join(
        f"{segment.repeats}({''.join(block[-1].kind[0] for block in segment.blocks)})"
        for segment in stack.segments
    )


@pytest.mark.parametrize(
    ("changes", "segments"),
    [
        ({"moe_every": 0}, "7(d)"),
        ({"moe_every": 0, "first_dense_layers": 3}, "7(d)"),
        ({"moe_every": 1}, "7(s)"),
        ({"moe_every": 2, "num_layers": 8}, "4(ds)"),
        ({"moe_every": 2, "num_layers": 8, "moe_position": "first"}, "4(sd)"),
        ({"moe_every": 2, "first_dense_layers": 3}, "3(d) 2(ds)"),
        ({"moe_every": 4, "first_dense_layers": 3}, "3(d) 1(ddds)"),
        ({"moe_every": 1, "first_dense_layers": 3}, "3(d) 4(s)"),
    ],
)
def test_layers_repeat_in_these_segments(changes, segments):
    stack = stack_of(**changes)
    assert written(stack) == segments
    assert len(stack.layers) == changes.get("num_layers", 7)


def test_sparse_layers_are_told_by_their_numbers():
    (place,) = layers_of(moe_every=2, first_dense_layers=3).sparse()
    assert (place.segment, place.block, list(place.numbers)) == (1, 1, [4, 6])
    assert place.sublayer.settings.router == ROUTER
    assert not list(layers_of(moe_every=0).sparse())


def test_the_first_sparse_layers_may_choose_by_a_table():
    router = RouterSettings(
        num_selected=2,
        scores="sqrt_softplus",
        renormalize="before_drop",
        selection_bias=True,
        overflow="spill",
        hash_gates="scores",
        group_size=16,
    )
    model = dataclasses.replace(MODEL, moe_every=1, first_hash_layers=3)
    layers = architecture.describe(model, router)
    assert written(layers.decoder) == "3(s) 4(s)"
    table, chosen = (place.sublayer.settings for place in layers.sparse())
    assert chosen.router == router
    assert (table.vocab_size, chosen.vocab_size) == (32, 0)
    given = {"num_selected": 2, "hash_gates": "scores", "group_size": 16}
    weighed = {"scores": "sqrt_softplus", "renormalize": "before_drop"}
    assert table.router == RouterSettings(family="hashed", **given, **weighed)
    even = dataclasses.replace(router, hash_gates="even", num_prototypes=2)
    table, _ = (
        p.sublayer.settings for p in architecture.describe(model, even).sparse()
    )
    given |= {"num_selected": 4, "hash_gates": "even"}
    assert table.router == RouterSettings(family="hashed", **given)
    short = shortened(model)
    assert (short.num_layers, short.first_hash_layers) == (2, 1)
    short = shortened(dataclasses.replace(model, first_hash_layers=7))
    assert (short.num_layers, short.first_hash_layers) == (2, 2)


def test_a_pyramid_has_a_segment_for_each_number_of_experts():
    layers = layers_of(
        moe_every=2, num_layers=8, num_experts=16, experts_per_layer=(4, 4, 16, 16)
    )
    assert written(layers.decoder) == "2(ds) 2(ds)"
    experts = [p.sublayer.settings.num_experts for p in layers.sparse()]
    assert experts == [4, 16]
    assert layers.sparse_order == (), "they are in the order of the layers"


def test_two_stacks_are_made_of_the_words_of_both():
    router = dataclasses.replace(ROUTER, family="expert_choice")
    model = dataclasses.replace(
        MODEL,
        shape="encoder_decoder",
        num_layers=2,
        num_encoder_layers=6,
        moe_every=2,
        encoder_moe_every=3,
        num_experts=8,
        experts_per_layer=(4, 8, 2),
        positions="relative",
    )
    assert layer_problems(model) == []
    layers = architecture.describe(model, ROUTER, router)
    assert list(layers.stacks) == ["encoder", "decoder"]
    assert layers.scored == "decoder"
    assert written(layers.encoder) == "1(dds) 1(dds)"
    assert written(layers.decoder) == "1(ds)"
    sparse = [(p.stack, p.sublayer.settings) for p in layers.sparse()]
    assert [(name, s.num_experts) for name, s in sparse] == [
        ("encoder", 4),
        ("encoder", 8),
        ("decoder", 2),
    ]
    assert [s.router.family for _, s in sparse] == ["expert_choice"] * 2 + [
        "token_choice"
    ]
    heads = layers.encoder.settings("heads") + layers.decoder.settings("heads")
    assert [s.causal for s in heads] == [False] * 6 + [True] * 2
    assert [s.positions.two_sided for s in heads] == [True] * 6 + [False] * 2
    assert len(layers.decoder.settings("cross")) == 2
    assert not layers.encoder.settings("cross")
    more = {"num_layers": 8, "experts_per_layer": (4, 8, 2, 2, 2, 2)}
    short = shortened(dataclasses.replace(model, **more))
    assert (short.num_encoder_layers, short.encoder_moe_every) == (6, 3)
    assert (short.num_layers, short.experts_per_layer) == (4, (4, 8, 2, 2))


def test_faults_of_an_encoder_are_called_by_its_own_macros():
    model = dataclasses.replace(MODEL, shape="encoder_decoder", moe_every=7)
    model = dataclasses.replace(model, num_encoder_layers=5, encoder_moe_every=2)
    (found,) = layer_problems(model)
    assert found.startswith(
        "NUM_ENCODER_LAYERS = 5 is not a multiple of ENCODER_MOE_EVERY = 2"
    )


def test_an_encoder_alone_sees_all_and_may_be_normalised_after():
    layers = layers_of(shape="encoder", norm="layer", norm_place="after")
    assert layers.decoder is None
    assert layers.scored == "encoder"
    assert layers.encoder.norm is None
    (s, *_) = layers.settings("heads")
    assert not s.causal
    (block, *_) = layers.encoder.layers
    assert {each.norm.place for each in block} == {"after"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"num_experts": 8},
            "NUM_EXPERTS = 8 must be the largest of EXPERTS_PER_LAYER",
        ),
        ({"experts_per_layer": (4, 4)}, "for each of the 4 sparse layers"),
        ({"experts_per_layer": (0, 4, 4, 4)}, "a number of at least 1"),
        ({"moe_every": 0}, "means nothing to MOE_EVERY = 0"),
    ],
)
def test_a_pyramid_that_does_not_fit_its_layers_is_said(changes, said):
    given = {"num_layers": 8, "num_experts": 4, "experts_per_layer": (2, 2, 4, 4)}
    fitting = dataclasses.replace(MODEL, **given)
    assert layer_problems(fitting) == []
    (found,) = layer_problems(dataclasses.replace(fitting, **changes))
    assert said in found


def test_windows_alternate_and_are_compiled_once_each():
    windows = (16, 0, 4)
    stack = stack_of(moe_every=2, num_layers=14, attention_windows=windows)
    heads = stack.settings("heads")
    assert [s.window for s in heads] == [windows[n % 3] for n in range(14)]
    # Six layers are a period of both, and two are left.
    assert written(stack) == "2(dsdsds) 1(ds)"
    assert [s.reach(8) for s in heads[:3]] == [8, 8, 4]


def test_some_layers_see_no_positions_nor_share_the_bias_by_distance():
    layers = {"position_layers": (1, 1, 0), "moe_every": 1, "num_layers": 7}
    for positions, kind in (("rotary", "rotary"), ("relative", "distance")):
        found = stack_of(positions=positions, **layers).settings("heads")
        expected = [kind, kind, "none"] * 2 + [kind]
        assert [s.positions.kind for s in found] == expected
        shared = [positions == "relative" and kind != "none" for kind in expected]
        assert [s.shares_bias for s in found] == shared


def test_what_is_shortened_keeps_windows_and_positions_as_they_stand_beside_another():
    given = {"attention_windows": (16, 0), "position_layers": (1, 1, 1, 0)}
    model = dataclasses.replace(MODEL, moe_every=0, num_layers=12, **given)
    short = shortened(model)
    # Layer by layer: a window, none, a window again, and neither.
    assert short.num_layers == 3
    assert short.attention_windows == (16, 0, 0)
    assert short.position_layers == (1, 1, 0)
    sparse = dataclasses.replace(model, moe_every=1)
    assert shortened(sparse).num_layers == 3


def test_queries_grow_only_in_layers_that_know_no_positions():
    grown = {"attention_growth": 0.1, "attention_growth_length": 8, "moe_every": 1}
    given = {"position_layers": (1, 0), "attention_chunks": (4, 0), "num_layers": 4}
    found = stack_of(**grown, **given).settings("heads")
    assert [(s.growth, s.growth_length) for s in found] == [(0.0, 0), (0.1, 8)] * 2
    assert [s.chunk for s in found] == [4, 0, 4, 0]
    (alone,) = stack_of(**grown, positions="none", num_layers=1).settings("heads")
    assert alone.growth == 0.1


def test_layers_with_a_window_may_have_a_base_of_their_own_that_is_not_scaled():
    scaled = {"rope_scaling": "linear", "rope_factor": 8.0, "rope_base": 1e6}
    given = {"attention_windows": (16, 0), "moe_every": 2, "num_layers": 2, **scaled}
    for base, expected in ((0.0, (1e6, "linear")), (1e4, (1e4, "none"))):
        stack = stack_of(rope_base_windowed=base, **given)
        windowed, other = (s.positions for s in stack.settings("heads"))
        assert (windowed.rotary_base, windowed.scaling) == expected
        assert (other.rotary_base, other.scaling) == (1e6, "linear")


@pytest.mark.parametrize(
    ("experts", "kept"),
    [((4, 4, 8, 8), (4, 8)), ((8, 4, 4, 4), (8, 4)), ((4, 8, 8, 4), (4, 8)), ((), ())],
)
def test_what_is_shortened_keeps_the_least_and_the_most_of_each(experts, kept):
    model = dataclasses.replace(
        MODEL,
        num_layers=8,
        num_experts=8,
        experts_per_layer=experts,
        attention_windows=(16, 16, 16, 0),
    )
    short = shortened(model)
    assert (short.num_layers, short.experts_per_layer) == (4, kept)
    assert short.attention_windows == (16, 0)
    assert layer_problems(short) == []
