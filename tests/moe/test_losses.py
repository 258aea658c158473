"""Losses and the ledger: formed once, from sums that merge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe.model.head import TargetScores
from moe.routing.assignment import RouterContext, RouterSums
from moe.routing.token_choice import route
from moe.settings import LossSettings, RouterSettings
from moe.training import ledger, losses
from moe.training.ledger import RouterTotals
from moe.training.losses import Sums

P, B, G, S, E, V = 2, 4, 4, 6, 3, 7
SCOPES = ("group", "sequence", "global")
COUNTS = ("first", "all")
form_total = jax.jit(losses.total, static_argnames="settings")


def router_sums(logits_GSE, mask_GS) -> RouterSums:
    """Sums of P layers of top-1 routers without drops; layer 2 sees logits doubled."""

    def one_layer(logits_GSE):
        probability_GSE = jax.nn.softmax(logits_GSE) * mask_GS[..., None]
        first_GSE = jax.nn.one_hot(jnp.argmax(logits_GSE, -1), logits_GSE.shape[-1])
        count_GE = jnp.sum(first_GSE * mask_GS[..., None], 1).astype(jnp.int32)
        z_GS = jax.nn.logsumexp(logits_GSE, axis=-1) ** 2
        return RouterSums(
            tokens_G=jnp.sum(mask_GS, 1),
            probability_GE=jnp.sum(probability_GSE, 1),
            load_GE=jnp.sum(jax.nn.sigmoid(logits_GSE) * mask_GS[..., None], 1),
            first_GE=count_GE,
            chosen_GE=count_GE,
            kept_GE=count_GE,
            spilled_GE=jnp.zeros_like(count_GE),
            padding_G=jnp.sum(~mask_GS, 1),
            z_G=jnp.sum(z_GS * mask_GS, 1),
            entropy_G=jnp.zeros(len(mask_GS)),
            square_G=jnp.zeros(len(mask_GS)),
            without_expert_G=jnp.zeros(len(mask_GS), jnp.int32),
            excess_G=jnp.zeros(len(mask_GS), jnp.int32),
        )

    return jax.tree.map(
        lambda *layers: jnp.stack(layers), *map(one_layer, (logits_GSE, 2 * logits_GSE))
    )


@functools.cache
def problem():
    """Logits, targets and weights of B rows, and router logits of G groups."""
    rng = np.random.default_rng(0)
    weight_BL = (rng.random((B, S)) < 0.7).astype(np.int32)
    weight_BL[0] = 0  # a row that only merging by weight gets right
    return {
        "logits": rng.normal(size=(B, S, V)).astype(np.float32) * 3,
        "target": rng.integers(0, V, (B, S)).astype(np.int32),
        "weight": weight_BL,
        "router": rng.normal(size=(G, S, E)).astype(np.float32) * 2,
        "mask": weight_BL > 0,
    }


def scores_of(logits_BLV, target_BL) -> TargetScores:
    """What losses need of logits that are all there."""
    target_logit_BL1 = jnp.take_along_axis(logits_BLV, target_BL[..., None], axis=-1)
    return TargetScores(
        log_z_BL=jax.nn.logsumexp(logits_BLV, axis=-1),
        target_logit_BL=target_logit_BL1[..., 0],
        likeliest_BL=jnp.argmax(logits_BLV, axis=-1),
    )


@jax.jit
def sums_of(problem) -> Sums:
    router = router_sums(problem["router"], problem["mask"])
    scores = scores_of(problem["logits"], problem["target"])
    target_BL, weight_BL = problem["target"], problem["weight"]
    return losses.sums(scores, target_BL, weight_BL, (router,), LossSettings())


def balance_of(sums, num_sequences: int, scope: str, counts: str = "first"):
    """The balance loss of every layer, of sums per group."""
    settings = LossSettings(balance_scope=scope, balance_counts=counts)
    totals = losses.router_totals(sums, num_sequences, settings)
    return losses.balance_P(totals, settings)


@functools.partial(jax.jit, static_argnames="num_sequences")
def balances(logits_GSE, mask_GS, num_sequences):
    """The balance loss of every layer, in all scopes, of first choices."""
    sums = router_sums(logits_GSE, mask_GS)
    return {scope: balance_of(sums, num_sequences, scope) for scope in SCOPES}


def test_balance_is_one_in_every_layer_when_experts_are_used_alike():
    # Token s prefers expert s mod 2 by a little: f = ½ each, and P = ½ each.
    logits_GSE = np.tile([[0.1, 0.0], [0.0, 0.1]], (2, 4, 1)).astype(np.float32)
    mask_GS = np.ones((2, 8), bool)
    mask_GS[1, 2:] = False  # a group of two tokens counts as two, not as eight
    values = balances(logits_GSE, mask_GS, num_sequences=2)
    for scope in SCOPES:
        np.testing.assert_allclose(values[scope], np.ones(P), rtol=1e-6)


@pytest.mark.fast
def test_balance_within_groups_and_over_the_batch_as_worked_out_by_hand():
    probability_GSE = np.full((2, 8, 2), 0.5)
    probability_GSE[0, :3] = [0.8, 0.2]
    probability_GSE[1, :1] = [0.3, 0.7]
    mask_GS = np.zeros((2, 8), bool)
    mask_GS[0, :3] = mask_GS[1, :1] = True
    logits_GSE = np.log(probability_GSE).astype(np.float32)
    values = balances(logits_GSE, mask_GS, num_sequences=1)
    # Group 1: f = (1, 0), P = (0.8, 0.2): 2 · 0.8 = 1.6, of three tokens.
    # Group 2: f = (0, 1), P = (0.3, 0.7): 2 · 0.7 = 1.4, of one token.
    np.testing.assert_allclose(values["group"][0], (3 * 1.6 + 1.4) / 4, rtol=1e-6)
    # f = (¾, ¼), P = (2.7, 1.3) / 4: 2 · (0.75 · 0.675 + 0.25 · 0.325) = 1.175. The
    # two groups are cuts of one sequence, which is the whole batch.
    np.testing.assert_allclose(values["global"][0], 1.175, rtol=1e-6)
    np.testing.assert_allclose(values["sequence"][0], 1.175, rtol=1e-6)


def group_sums(**changes) -> RouterSums:
    """Sums of one layer and its groups; what is not given is 0."""
    shape = np.shape(changes["probability_GE"])
    zeros = {
        field.name: np.zeros(shape if field.name.endswith("_GE") else shape[:2])
        for field in dataclasses.fields(RouterSums)
    }
    given = {name: np.asarray(value, np.float32) for name, value in changes.items()}
    return RouterSums(**zeros | given)


@pytest.mark.fast
def test_balance_of_sequences_and_of_all_choices_as_worked_out_by_hand():
    # Two sequences of two groups each; the second group of the second is padding.
    sums = group_sums(
        tokens_G=[[3, 1, 2, 0]],
        probability_GE=[[[2.4, 0.6], [0.3, 0.7], [0.4, 1.6], [0, 0]]],
        first_GE=[[[3, 0], [0, 1], [0, 2], [0, 0]]],
        # Two choices each, but of the first group, of which two second ones declined.
        chosen_GE=[[[3, 1], [1, 1], [2, 2], [0, 0]]],
    )

    @functools.partial(jax.jit, static_argnames="num_sequences")
    def balance(sums, num_sequences):
        return {
            (scope, counts): balance_of(sums, num_sequences, scope, counts)[0]
            for scope in SCOPES
            for counts in COUNTS
        }

    expected = {
        # 2 · 0.8, 2 · 0.7 and 2 · 0.8, of three, one and two tokens.
        ("group", "first"): (3 * 1.6 + 1.4 + 2 * 1.6) / 6,
        # f = (¾, ¼), P = (0.8, 0.2): 1.3; f = (½, ½) is 1 whatever the router says.
        ("group", "all"): (3 * 1.3 + 1 + 2 * 1) / 6,
        # f = (¾, ¼), P = (0.675, 0.325): 1.175, of four tokens; f = (0, 1), P = (0.2,
        # 0.8): 1.6, of two.
        ("sequence", "first"): (4 * 1.175 + 2 * 1.6) / 6,
        # f = (⅔, ⅓): 2 · (⅔ · 0.675 + ⅓ · 0.325) = 1.35 / 1.5 + 0.65 / 3.
        ("sequence", "all"): (4 * (1.35 / 1.5 + 0.65 / 3) + 2 * 1) / 6,
        # f = (½, ½) of the six first choices, and P = (3.1, 2.9) / 6.
        ("global", "first"): 1.0,
        # f = (0.6, 0.4): 2 · (0.6 · 3.1 + 0.4 · 2.9) / 6.
        ("global", "all"): 2 * (0.6 * 3.1 + 0.4 * 2.9) / 6,
    }
    actual = balance(sums, num_sequences=2)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.fast
def test_all_choices_used_alike_have_a_balance_of_one_however_many_they_are():
    # E = 4 experts, K = 2: each is chosen by half of the tokens, and 1 is the least
    # that probabilities that agree with the choices can give.
    sums = group_sums(
        tokens_G=[[8]],
        probability_GE=[[[2, 2, 2, 2]]],
        first_GE=[[[8, 0, 0, 0]]],
        chosen_GE=[[[4, 4, 4, 4]]],
    )
    for scope in SCOPES:
        assert balance_of(sums, 1, scope, "all") == 1


@pytest.mark.fast
def test_squared_variation_is_the_squared_coefficient_of_variation():
    # Mean 2, variance (1 + 0 + 1) / 3; mean 4, variance 0; nothing at all.
    sum_PE = np.array([[1, 2, 3], [4, 4, 4], [0, 0, 0]], np.float32)
    value_P, gradient_PE = jax.jit(
        lambda x: (
            losses.squared_variation(x),
            jax.grad(lambda y: losses.squared_variation(y).sum())(x),
        )
    )(sum_PE)
    np.testing.assert_allclose(value_P, [2 / 3 / 4, 0, 0], rtol=1e-6)
    assert np.all(np.isfinite(gradient_PE))
    # Scale does not matter, so along itself a row has no slope.
    np.testing.assert_allclose(np.sum(gradient_PE * sum_PE, -1), 0, atol=1e-6)
    assert gradient_PE[0, 0] < 0 < gradient_PE[0, 2]


def test_the_gradient_of_balance_flows_through_the_probabilities_alone():
    logits_GSE = problem()["router"][:1]
    context = RouterContext(mask_GS=np.ones((1, S), bool), key_G=None)

    @jax.jit
    @jax.jacrev
    def gradients(logits_GSE):
        sums = route(logits_GSE, context, RouterSettings(), capacity=S).sums
        one_layer = jax.tree.map(lambda x: x[None], sums)
        return {
            (scope, counts): balance_of(one_layer, 1, scope, counts)[0]
            for scope in SCOPES
            for counts in COUNTS
        }

    # E·Σ_e f_e·P_e with f constant and P_e = Σ_s p_se / S, so that
    # d/dlogit_se = E / S · p_se · (f_e − Σ_i f_i p_si).
    p_SE = np.asarray(jax.nn.softmax(logits_GSE[0]), np.float64)
    f_E = np.bincount(p_SE.argmax(-1), minlength=E) / S
    expected_SE = E / S * p_SE * (f_E - (p_SE @ f_E)[:, None])
    for gradient_GSE in gradients(logits_GSE).values():
        np.testing.assert_allclose(gradient_GSE[0], expected_SE, rtol=1e-5, atol=1e-7)


def totals(**changes) -> RouterTotals:
    """Totals of two layers and three experts; what is not given is 0."""
    values = {}
    for field in dataclasses.fields(RouterTotals):
        shape = (2, 3) if field.name.endswith("_PE") else (2,)
        values[field.name] = np.zeros(shape, np.float32)
    return RouterTotals(**values | changes)


@pytest.mark.fast
@pytest.mark.parametrize("over_layers", ["sum", "mean"])
def test_router_losses_are_means_over_tokens_and_a_sum_or_mean_over_layers(over_layers):
    router = totals(
        tokens_P=np.array([4, 4]),
        z_P=np.array([2.0, 6.0], np.float32),
        probability_PE=np.array([[1, 2, 3], [4, 4, 4]], np.float32),
        load_PE=np.array([[4, 4, 4], [6, 4, 2]], np.float32),
        local_balance_P=np.array([4.0, 8.0]),
    )
    settings = LossSettings(
        balance_weight=0.01,
        router_z_weight=0.1,
        importance_weight=0.2,
        load_weight=0.3,
        over_layers=over_layers,
    )
    value, metrics = form_total(Sums(*[np.zeros(())] * 5, (router,)), settings)
    # z: 2 / 4 and 6 / 4. Balance: 4 / 4 and 8 / 4. Importance: (2/3) / 2², and 0 where
    # experts weigh alike; load: 0 and (8/3) / 4². Metrics show the mean over layers.
    importance, load = [1 / 6, 0], [0, 1 / 6]
    over = {"sum": np.sum, "mean": np.mean}[over_layers]
    expected = 0.1 * over([0.5, 1.5]) + 0.01 * over([1, 2])
    expected += 0.2 * over(importance) + 0.3 * over(load)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/router_z"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/balance"], 1.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/importance"], 1 / 12, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/load"], 1 / 12, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss/total"], value, rtol=0)


@pytest.mark.fast
def test_losses_that_are_switched_off_are_no_metrics():
    metrics = jax.eval_shape(
        lambda: losses.total(Sums(*[jnp.zeros(())] * 5, (totals(),)), LossSettings())[1]
    )
    assert {name for name in metrics if name.startswith("loss/")} == {
        "loss/total",
        "loss/nats_per_token",
        "loss/output_z",
        "loss/balance",
        "loss/router_z",
    }


def test_cross_entropy_z_and_accuracy_are_weighted_means_over_targets():
    p = problem()
    dense = dataclasses.replace(sums_of(p), router=())
    value, metrics = form_total(dense, LossSettings(z_weight=0.25))
    cross_entropy_BL = jax.jit(optax.softmax_cross_entropy_with_integer_labels)(
        p["logits"], p["target"]
    )
    mean = functools.partial(np.average, weights=p["weight"])
    cross_entropy = mean(cross_entropy_BL)
    z = mean(np.log(np.exp(p["logits"].astype(np.float64)).sum(-1)) ** 2)
    accuracy = mean(p["logits"].argmax(-1) == p["target"])
    assert 0 < accuracy < 1
    np.testing.assert_allclose(metrics["loss/nats_per_token"], cross_entropy, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy/fraction"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(value, cross_entropy + 0.25 * z, rtol=1e-6)


def test_smoothed_labels_and_a_normalizing_factor_agree_with_loops():
    p, alpha, factor = problem(), 0.1, 7.0
    settings = LossSettings(label_smoothing=alpha, normalizing_factor=factor)
    logits = p["logits"].astype(np.float64)
    V = logits.shape[-1]
    expected = 0.0
    for place in np.ndindex(p["target"].shape):
        row = logits[place]
        log_p = row - np.log(np.sum(np.exp(row)))
        label = np.full(V, alpha / (V - 1))
        label[p["target"][place]] = 1 - alpha
        divergence = np.sum(label * (np.log(label) - log_p))
        expected += p["weight"][place] * divergence / factor
    scores = scores_of(p["logits"], p["target"])
    scores = dataclasses.replace(scores, logit_sum_BL=p["logits"].sum(-1))
    sums = losses.sums(scores, p["target"], p["weight"], (), settings, vocab_size=V)
    value, metrics = form_total(sums, settings)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    plain = form_total(dataclasses.replace(sums_of(p), router=()), LossSettings())[1]
    for name in ("loss/nats_per_token", "accuracy/fraction"):
        np.testing.assert_allclose(metrics[name], plain[name], rtol=1e-6)


def test_targets_of_weight_zero_change_nothing():
    p = problem()
    hidden_BL = p["weight"] == 0
    changed = p | {
        "logits": np.where(hidden_BL[..., None], 9 * p["logits"], p["logits"]),
        "target": np.where(hidden_BL, 0, p["target"]),
        "router": np.where(hidden_BL[..., None], -p["router"], p["router"]),
    }
    jax.tree.map(np.testing.assert_array_equal, sums_of(changed), sums_of(p))


@pytest.mark.parametrize("scope", SCOPES)
def test_the_sums_of_two_halves_add_up_to_the_whole(scope):
    settings = LossSettings(
        balance_scope=scope,
        balance_counts="all" if scope == "sequence" else "first",
        z_weight=0.1,
        importance_weight=0.01,
        load_weight=0.01,
    )
    halves = [
        jax.device_get(sums_of(jax.tree.map(lambda x, i=i: x[i : i + 2], problem())))
        for i in (0, 2)
    ]
    merged = jax.tree.map(np.add, *halves)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        merged,
        jax.device_get(sums_of(problem())),
    )
    whole, _ = form_total(sums_of(problem()), settings)
    np.testing.assert_allclose(form_total(merged, settings)[0], whole, rtol=1e-6)
    mean_of_means = np.mean([form_total(x, settings)[0] for x in halves])
    assert abs(mean_of_means - whole) > 0.01, "the halves are meant to weigh unequally"


@pytest.mark.parametrize("scope", SCOPES)
def test_a_batch_without_tokens_gives_finite_numbers(scope):
    settings = LossSettings(
        balance_scope=scope, z_weight=0.1, importance_weight=0.01, load_weight=0.01
    )
    nothing = problem() | {
        "weight": np.zeros((B, S), np.int32),
        "mask": np.zeros((G, S), bool),
    }

    def objective(logits):
        return losses.total(sums_of(nothing | logits), settings)

    gradients, metrics = jax.jit(jax.grad(objective, has_aux=True))(
        {name: nothing[name] for name in ("logits", "router")}
    )
    assert metrics["loss/total"] == 0
    for value in jax.tree.leaves((gradients, metrics)):
        assert np.all(np.isfinite(value))


@pytest.mark.fast
def test_the_ledger_accounts_for_every_choice():
    router = totals(
        tokens_P=np.array([3, 3]),
        chosen_PE=np.array([[4, 2, 0], [2, 2, 2]]),
        kept_PE=np.array([[3, 2, 0], [2, 0, 2]]),
        spilled_PE=np.array([[1, 2, 0], [0, 0, 0]]),
        padding_P=np.array([2, 2]),
        entropy_P=np.array([1.5, 3.0], np.float32),
        square_P=np.array([12.0, 84.0], np.float32),
        without_expert_P=np.array([0, 2]),
        excess_P=np.array([0, 5]),
    )
    expected = {
        "router/load": [[2 / 3, 1 / 3, 0], [1 / 3] * 3],
        "router/dropped_fraction_per_layer": [1 / 6, 2 / 6],
        "router/entropy_nats_per_layer": [0.5, 1.0],  # 1.5 / 3 and 3 / 3
        "router/dropped_fraction": 3 / 12,
        "router/spilled_fraction": 3 / 12,
        "router/tokens_without_expert_fraction": 2 / 6,
        "router/entropy_nats": 0.75,
        "router/logit_rms": 4.0,  # √((12 / 3 + 84 / 3) / 2)
        "router/max_violation": 1.0,  # the largest load, ⅔, is twice the fair ⅓
        "router/dead_experts": 1,  # never chosen; full is another thing
        "router/over_budget_rows": 5,
        "ledger/routed_choices": [8, 8],  # 6 chosen and 2 of padding in each layer
        "ledger/computed_choices": [5, 4],
        "ledger/spilled_choices": [3, 0],
        "ledger/dropped_choices": [1, 2],
        "ledger/padding_choices": [2, 2],
        "ledger/tokens": [3, 3],
        "ledger/tokens_without_expert": [0, 2],
    }
    actual = jax.device_get(jax.jit(ledger.ledger)((router,)))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.fast
def test_a_ledger_beyond_32_bits_keeps_its_fractions_and_its_layers():
    chosen_PE = np.full((2, 3), 2**29, np.int32)  # 1.5 · 2³⁰ a layer, 3 · 2³⁰ in all
    zero_P = np.zeros(2, np.int32)
    router = totals(chosen_PE=chosen_PE, kept_PE=chosen_PE // 2, padding_P=zero_P)
    found = jax.device_get(jax.jit(ledger.ledger)((router,)))
    assert found["router/dropped_fraction"] == 0.5
    np.testing.assert_array_equal(found["ledger/routed_choices"], [3 * 2**29] * 2)


@pytest.mark.fast
def test_layers_of_different_experts_are_all_accounted_for_in_their_order():
    few = totals(
        tokens_P=np.array([2, 2]),
        chosen_PE=np.array([[2, 0, 0], [1, 1, 0]]),
        kept_PE=np.array([[1, 0, 0], [1, 1, 0]]),
        z_P=np.array([2.0, 4.0], np.float32),
        excess_P=np.array([0, 7]),
    )
    many = {
        field.name: np.zeros((1, 4) if field.name.endswith("_PE") else 1, np.float32)
        for field in dataclasses.fields(RouterTotals)
    }
    many |= {"tokens_P": np.array([2]), "z_P": np.array([6.0], np.float32)}
    many |= {"chosen_PE": np.array([[1, 1, 1, 1]]), "kept_PE": np.array([[1, 1, 1, 0]])}
    router = few, RouterTotals(**many)
    # The layer of four experts lies between the others.
    settings = LossSettings(balance_weight=0.0, router_z_weight=1.0)
    value, metrics = losses.total(
        Sums(*[jnp.zeros(())] * 5, router), settings, (0, 2, 1)
    )
    assert value == 1 + 3 + 2
    nan = np.nan
    np.testing.assert_allclose(
        metrics["router/load"],
        [[1, 0, 0, nan], [0.25] * 4, [0.5, 0.5, 0, nan]],
    )
    assert metrics["ledger/dropped_choices"].tolist() == [1, 1, 0]
    assert metrics["router/dropped_fraction"] == 2 / 8
    assert metrics["router/over_budget_rows"] == 7
    assert metrics["router/max_violation"] == 2  # 3 · 1 - 1
    assert metrics["router/dead_experts"] == 2 + 1
