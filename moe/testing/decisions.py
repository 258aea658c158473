"""The oracle of every router: who asks for what, who sits where, at which gates.

Plain loops over the tokens of one group, in float64, written from the papers and from
`RouterSettings`, not from `moe/routing`. Capped expert choice has no oracle: it is the
end of an iteration, and is tested by what it promises.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from moe.settings import RouterSettings

Choice = tuple[int, int]  # token s and number j of its choice


@dataclasses.dataclass
class Told:
    """What the router of one group is told beside its logits.

    Attributes:
        mask_S: True for real tokens.
        train: whether this is training.
        bias_E: added to the scores for selection alone.
        draw_S: the uniform draws by which second choices are kept.
        clean_logits_SE: the logits before noise.
        id_S: ids of the tokens, for hash routing.
        order_V: each id's place in the order of the vocabulary, for hash routing.
    """

    mask_S: np.ndarray
    train: bool = True
    bias_E: np.ndarray | None = None
    draw_S: np.ndarray | None = None
    clean_logits_SE: np.ndarray | None = None
    id_S: np.ndarray | None = None
    order_V: np.ndarray | None = None


@dataclasses.dataclass
class Decision:
    """What was decided for one group.

    Attributes:
        picked: experts that each real token picked, in order of choice.
        wanted: expert of every choice that asks for a slot.
        seated: expert and slot of every choice that got one.
        spilled: choices that got it at their second attempt.
    """

    picked: dict[int, list[int]]
    wanted: dict[Choice, int]
    seated: dict[Choice, tuple[int, int]]
    spilled: set[Choice]

    def held(self, s: int) -> dict[int, int]:
        """Expert of each choice j of token s that got a slot."""
        return {j: e for (t, j), (e, _) in sorted(self.seated.items()) if t == s}


def decide(
    logits_SE: np.ndarray, told: Told, settings: RouterSettings, capacity: int
) -> Decision:
    """Routes the tokens of one group."""
    logits_SE = np.asarray(logits_SE, np.float64)
    tokens = [s for s in range(len(logits_SE)) if told.mask_S[s]]
    picked, spare = _picks(logits_SE, tokens, told, settings, capacity)
    wanted = {(s, j): e for s in tokens for j, e in enumerate(picked[s])}
    if settings.second_policy == "random" and told.train:
        assert told.draw_S is not None
        for s in tokens:
            _, gate = picked_gates(logits_SE[s], picked[s], settings)
            if told.draw_S[s] >= 2 * gate:
                del wanted[s, 1]

    queue = tokens
    if settings.slot_order == "batch_priority":
        surest = {
            s: max(picked_gates(logits_SE[s], picked[s], settings)) for s in tokens
        }
        queue = sorted(tokens, key=lambda s: (-surest[s], s))
    arrivals = _arrivals(wanted, queue, settings.slot_order)
    seated: dict[Choice, tuple[int, int]] = {}
    taken_E = [0] * logits_SE.shape[1]

    def seat(choice: Choice, e: int) -> None:
        if taken_E[e] < capacity:
            seated[choice] = (e, taken_E[e])
            taken_E[e] += 1

    for choice in arrivals:
        seat(choice, wanted[choice])
    homeless = [choice for choice in arrivals if choice not in seated]
    if settings.overflow == "spill":
        for s, j in homeless:
            seat((s, j), spare[s][j])
    spilled = {choice for choice in homeless if choice in seated}
    return Decision(picked, wanted, seated, spilled)


def scores(logits_E: np.ndarray, settings: RouterSettings) -> np.ndarray:
    """What weighs, and mostly what chooses: per prototype, if there are several."""
    if settings.scores == "sigmoid":
        return 1 / (1 + np.exp(-logits_E))
    if settings.scores == "sqrt_softplus":
        return np.sqrt(np.log1p(np.exp(logits_E)))
    parts = np.split(logits_E, settings.num_prototypes)
    return np.concatenate([_softmax(part) for part in parts])


def probabilities(logits_E: np.ndarray, settings: RouterSettings) -> np.ndarray:
    """What balance losses even out; a hash router has none."""
    if settings.family == "hashed":
        return np.zeros_like(logits_E)
    score_E = scores(logits_E, settings)
    return score_E if settings.scores == "softmax" else score_E / score_E.sum()


def picked_gates(
    logits_E: np.ndarray, picked: list[int], settings: RouterSettings
) -> list[float]:
    """Gates of a token's picked experts, before slots are given out."""
    return [_gate(logits_E, e, j, picked, settings) for j, e in enumerate(picked)]


def held_gates(
    logits_E: np.ndarray,
    picked: list[int],
    held: dict[int, int],
    settings: RouterSettings,
) -> dict[int, float]:
    """Gates of the choices j of a token that got a slot, given what was decided."""
    gates = {j: _gate(logits_E, e, j, picked, settings) for j, e in held.items()}
    if settings.renormalize == "after_drop":
        total = sum(gates.values())
        gates = {j: gate / total for j, gate in gates.items()}
    return {j: settings.gate_scale * gate for j, gate in gates.items()}


def router_sums(
    logits_SE: np.ndarray,
    told: Told,
    decision: Decision,
    settings: RouterSettings,
    row: int = 0,
) -> dict[str, np.ndarray]:
    """Sums of one row of a group, by the names of `RouterSums` without suffixes."""
    logits_SE = np.asarray(logits_SE, np.float64)
    S, E = logits_SE.shape
    names = ("probability", "load", "first", "chosen", "kept", "spilled")
    sums = {name: np.zeros(E) for name in names}
    of_tokens = ("tokens", "z", "entropy", "square", "without_expert")
    sums |= {name: np.zeros(()) for name in of_tokens}
    length = S // settings.group_rows
    here = range(row * length, (row + 1) * length)
    tokens = [s for s in here if told.mask_S[s]]
    wanted = {c: e for c, e in decision.wanted.items() if c[0] in here}
    seated = {c: e for c, (e, _) in decision.seated.items() if c[0] in here}
    num_choices = settings.num_prototypes * settings.num_selected
    if settings.family == "expert_choice":
        num_choices = E
    sums["padding"] = np.asarray(num_choices * (length - len(tokens)))
    for s in tokens:
        sums["tokens"] += 1
        sums["without_expert"] += not decision.held(s)
        p_E = probabilities(logits_SE[s], settings)
        sums["probability"] += p_E
        sums["entropy"] -= sum(p * math.log(p) for p in p_E if p > 0)
        if settings.reads_logits:
            sums["z"] += z_loss(logits_SE[s], settings)
            sums["square"] += np.mean(logits_SE[s] ** 2)
        if told.clean_logits_SE is not None:
            sums["load"] += chances(logits_SE[s], told.clean_logits_SE[s], settings)
    for (_, j), e in wanted.items():
        sums["chosen"][e] += 1
        # Every prototype has a first choice of its own; experts that choose have no
        # second.
        if settings.family == "expert_choice" or j % settings.num_selected == 0:
            sums["first"][e] += 1
    for choice, e in seated.items():
        sums["kept"][e] += 1
        sums["spilled"][e] += choice in decision.spilled
    return sums


def chances(
    logits_E: np.ndarray, clean_E: np.ndarray, settings: RouterSettings
) -> np.ndarray:
    """Chance of each expert to reach the K-th largest noisy logit if drawn again.

    V-MoE (arXiv:2106.05974, appendix A.2), with noise of LOGIT_NOISE / E.
    """
    threshold = sorted(logits_E, reverse=True)[settings.num_selected - 1]
    deviation = settings.logit_noise / len(logits_E)
    needed_E = [(threshold - clean) / deviation for clean in clean_E]
    return np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in needed_E])


def z_loss(logits_E: np.ndarray, settings: RouterSettings) -> float:
    """Squared logarithm of the sum of exponentials, averaged over the prototypes."""
    squares = []
    for logits_e in np.split(logits_E, settings.num_prototypes):
        top = logits_e.max()
        squares.append((top + np.log(np.sum(np.exp(logits_e - top)))) ** 2)
    return float(np.mean(squares))


def slope(function: Callable[[np.ndarray], float], x_N: np.ndarray) -> np.ndarray:
    """Gradient of a smooth function, by central differences."""
    step = 1e-5  # an error of step² from the curve, of 1e-16 / step from rounding
    d_N = np.zeros_like(x_N)
    for n in range(len(x_N)):
        moved_N = np.zeros_like(x_N)
        moved_N[n] = step
        d_N[n] = (function(x_N + moved_N) - function(x_N - moved_N)) / (2 * step)
    return d_N


def sinkhorn(logits_SE: np.ndarray, iterations: int) -> np.ndarray:
    """Scales exp(logits) to rows of 1, then to columns of S / E, again and again."""
    S, E = logits_SE.shape
    a_SE = np.exp(logits_SE - logits_SE.max(axis=1, keepdims=True))
    for _ in range(iterations):
        for s in range(S):
            a_SE[s] /= a_SE[s].sum()
        for e in range(E):
            a_SE[:, e] *= S / E / a_SE[:, e].sum()
    return a_SE


def _softmax(logits_E: np.ndarray) -> np.ndarray:
    exponent_E = np.exp(logits_E - logits_E.max())
    return exponent_E / exponent_E.sum()


def _picks(
    logits_SE: np.ndarray,
    tokens: list[int],
    told: Told,
    settings: RouterSettings,
    capacity: int,
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """The experts of each token in order of choice, and those it would spill to."""
    if settings.family == "expert_choice":
        return _picked_by_experts(logits_SE, tokens, capacity), {}
    if settings.family == "hashed":
        assert told.id_S is not None
        assert told.order_V is not None
        K, E = settings.num_selected, logits_SE.shape[1]
        place = {s: int(told.order_V[told.id_S[s]]) for s in tokens}
        return {s: [(place[s] + k) % E for k in range(K)] for s in tokens}, {}
    liking_SE = _liking(logits_SE, told, settings)
    ranked = {s: _ranked(liking_SE[s], settings) for s in tokens}
    return {s: ranked[s][0] for s in tokens}, {s: ranked[s][1] for s in tokens}


def _liking(logits_SE: np.ndarray, told: Told, settings: RouterSettings) -> np.ndarray:
    """What tokens choose by."""
    liking_SE = np.array([scores(logits_E, settings) for logits_E in logits_SE])
    if settings.family == "sinkhorn" and told.train and np.any(told.mask_S):
        liking_SE[told.mask_S] = sinkhorn(
            logits_SE[told.mask_S], settings.sinkhorn_iterations
        )
    return liking_SE if told.bias_E is None else liking_SE + told.bias_E


def _ranked(
    liking_E: np.ndarray, settings: RouterSettings
) -> tuple[list[int], list[int]]:
    """A token's K best experts, of every prototype; and the K after them."""
    E, K, Z = len(liking_E), settings.num_selected, settings.num_prototypes
    picked: list[int] = []
    spare: list[int] = []
    for experts in np.split(np.arange(E), Z):
        allowed = _allowed(liking_E, experts, settings)
        best = sorted(allowed, key=lambda e: (-liking_E[e], e))
        picked += best[:K]
        spare += best[K : 2 * K]
    return picked, spare


def _allowed(
    liking_E: np.ndarray, experts: np.ndarray, settings: RouterSettings
) -> list[int]:
    """The experts of a token's best groups of experts."""
    num_best = {"max": 1, "top2_sum": 2}[settings.group_score]
    groups = np.split(experts, settings.num_expert_groups)

    def worth(group: np.ndarray) -> float:
        return sum(sorted((liking_E[e] for e in group), reverse=True)[:num_best])

    best = sorted(range(len(groups)), key=lambda i: (-worth(groups[i]), i))
    return [int(e) for i in best[: settings.num_selected_groups] for e in groups[i]]


def _picked_by_experts(
    logits_SE: np.ndarray, tokens: list[int], capacity: int
) -> dict[int, list[int]]:
    """Each expert's C best tokens, as each token's experts, the most probable first."""
    p_SE = np.array([_softmax(logits_E) for logits_E in logits_SE])
    takers: dict[int, list[int]] = {s: [] for s in tokens}
    for e in range(logits_SE.shape[1]):
        for s in sorted(tokens, key=lambda s: (-p_SE[s, e], s))[:capacity]:
            takers[s].append(e)
    return {s: sorted(takers[s], key=lambda e: (-p_SE[s, e], e)) for s in tokens}


def _arrivals(
    wanted: dict[Choice, int], queue: list[int], slot_order: str
) -> list[Choice]:
    """Choices in the order in which slots are given out."""
    place = {s: i for i, s in enumerate(queue)}
    if slot_order == "token_major":
        return sorted(wanted, key=lambda choice: (place[choice[0]], choice[1]))
    return sorted(wanted, key=lambda choice: (choice[1], place[choice[0]]))


def _gate(
    logits_E: np.ndarray, e: int, j: int, picked: list[int], settings: RouterSettings
) -> float:
    """Gate of expert e for choice j, before anything is dropped."""
    K = settings.num_selected
    if settings.family == "hashed" and settings.hash_gates == "even":
        return 1 / K
    score_E = scores(logits_E, settings)
    if settings.renormalize != "before_drop":
        return float(score_E[e])
    first = j // K * K  # of the prototype
    return float(score_E[e] / sum(score_E[i] for i in picked[first : first + K]))
