"""The rules by which arrays of public models become ours, without those models.

`python -m benchmarks.public_models` compares what both compute.
"""

import jax
import numpy as np
import pytest

from benchmarks.public_models import ours
from benchmarks.public_models.families import (
    DENSE_DIM,
    FAMILIES,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    VOCAB,
    WIDTH,
)
from launch.exchange import rules
from launch.exchange.family import ExchangeError
from launch.exchange.matching import Ours, ours_of

pytestmark = pytest.mark.fast


def numbered(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


def test_a_dim_of_several_letters_is_taken_apart():
    x = numbered(6, 5)
    found = rules.arranged(x, "ND,M -> M,N,D", (5, 2, 3))
    for m, n, d in np.ndindex(5, 2, 3):
        assert found[m, n, d] == x[3 * n + d, m]
    alternating = rules.arranged(x, "Fc,M -> M,c,F", (5, 2, 3))
    for m, c, f in np.ndindex(5, 2, 3):
        assert alternating[m, c, f] == x[2 * f + c, m]


def test_one_of_two_blocks_is_taken():
    x = numbered(10, 4)  # two heads of [3 | 2]
    first = rules.arranged(x, "N[D|W],R -> R,N,D", (4, 2, 3))
    second = rules.arranged(x, "N[D|W],R -> R,N,W", (4, 2, 2))
    for r, n in np.ndindex(4, 2):
        assert list(first[r, n]) == list(x[5 * n : 5 * n + 3, r])
        assert list(second[r, n]) == list(x[5 * n + 3 : 5 * n + 5, r])


def test_one_of_three_blocks_is_taken_and_put_back():
    x = numbered(5, 18)  # of queries, of keys, of values: two heads of 3
    made = np.zeros_like(x)
    for block in range(3):
        dims = f"M,[{block + 1}/3]ND -> M,N,D"
        found = rules.arranged(x, dims, (5, 2, 3))
        for m, n, d in np.ndindex(5, 2, 3):
            assert found[m, n, d] == x[m, 6 * block + 3 * n + d]
        rules.put(found, made, dims)
        sizes = {"M": 5, "N": 2, "D": 3}
        assert rules.shape_of(dims, sizes) == (5, 18)
    assert np.array_equal(made, x)


def test_two_arrays_are_stacked():
    theirs = {"at.a": numbered(3, 5), "at.b": -numbered(3, 5)}
    found = rules.read(theirs, "at.", ("a + b", "c,F,M -> M,c,F"), (5, 2, 3))
    assert np.array_equal(found[:, 0], theirs["at.a"].T)
    assert np.array_equal(found[:, 1], theirs["at.b"].T)


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ("ND,M -> M,N,D", (5, 2, 4)),  # 6 are no 2 × 4
        ("M,N -> M,N", (5, 6)),  # the other way round
        ("F", (6,)),  # a dim too few
        ("N[D|W],M -> M,N,D", (5, 4, 1)),  # 6 are no 4 heads
        ("[D|W],M -> M,D", (5, 7)),  # more than there are
        ("[2/4]F,M -> M,F", (5, 2)),  # 6 are no 4 blocks of 2
    ],
)
def test_what_a_rule_does_not_fit_is_refused_by_name(dims, shape):
    with pytest.raises(ValueError, match=r"at\.x of shape \(6, 5\) is no"):
        rules.read({"at.x": numbered(6, 5)}, "at.", ("x", dims), shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_array_of_a_family_has_a_rule_of_its_dims(name):
    family = FAMILIES[name]
    model, rules = ours.described(family), family.all_rules()
    of_specs, _ = jax.tree_util.tree_flatten_with_path(model.specs)
    for keys, spec in of_specs:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        stack, _, within = path.partition("/layers/")
        of_layer = bool(within)
        shape = spec.shape[of_layer:]
        name = within.split("/", 2)[2] if of_layer else path
        found = Ours(path, None, stack if of_layer else "", name, "", shape, "")
        _, dims = found.rule_in(rules)
        rank = len(dims.rpartition(" -> ")[2].split(","))
        assert rank == len(shape), path


def test_an_array_that_no_rule_reads_is_an_error():
    family = FAMILIES["olmo2"]
    model, all_rules = ours.described(family), family.all_rules()
    theirs = {
        each.prefix + member.name: numbered(*rules.shape_of(member.dims, sizes))
        for each in ours_of(model.layers, family.layers)
        for member in rules.members(all_rules[each.rule], each.shape)
        for sizes in [
            {"N": HEADS, "D": HEAD_DIM, "U": KV_HEADS, "V": VOCAB}
            | {"M": WIDTH, "F": DENSE_DIM}
        ]
    }
    params = ours.parameters(family, model, theirs)
    assert params["head"].shape == (WIDTH, VOCAB)
    with pytest.raises(ExchangeError, match="not used: more"):
        ours.parameters(family, model, {**theirs, "more": numbered(1)})
    del theirs["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(ExchangeError, match=r"missing: model\.layers\.1\.self_attn"):
        ours.parameters(family, model, theirs)
