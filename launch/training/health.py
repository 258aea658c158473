"""Alarms about the routers: which layers, since when, and which setting helps.

A condition counts when it holds at three looks in a row, and is over when it has not
held at three. Each is said in one line when it begins, and when it is over.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_LOOKS = 3
_DEAD_LOOKS = 10  # few tokens of one step may pass an expert by


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A condition.

    Attributes:
        is_bad: function of the values, a number per layer, that says where it holds.
        words: what a value means.
        remedy: which setting helps.
    """

    is_bad: Callable[[np.ndarray], np.ndarray]
    words: str
    remedy: str


_KINDS = {
    "drops": _Kind(
        lambda percent_P: percent_P > 20,
        "{:.0f} % of the choices are dropped",
        "raise TRAIN_CAPACITY_FACTOR, or AUX_LOSS_FACTOR to spread the load",
    ),
    "tokens without an expert": _Kind(
        lambda percent_P: percent_P > 10,
        "{:.0f} % of the tokens reach no expert",
        "raise TRAIN_CAPACITY_FACTOR or NUM_SELECTED_EXPERTS",
    ),
    "uneven load": _Kind(
        lambda times_P: times_P > 6,
        "the busiest expert has {:.1f} times the mean load",
        "raise AUX_LOSS_FACTOR, or set ROUTER_BIAS with ROUTER_BIAS_RATE",
    ),
    "dead experts": _Kind(
        lambda number_P: number_P > 0,
        f"{{:.0f}} experts had no token at the last {_DEAD_LOOKS} looks",
        "raise AUX_LOSS_FACTOR or JITTER_NOISE, or set ROUTER_BIAS",
    ),
    "entropy collapse": _Kind(
        lambda percent_P: percent_P < 5,
        "the router's entropy is {:.1f} % of an even choice's",
        "raise ROUTER_Z_LOSS_FACTOR or JITTER_NOISE",
    ),
    "large logits": _Kind(
        lambda rms_P: rms_P > 30,
        "the root mean square of the router's logits is {:.0f}",
        "raise ROUTER_Z_LOSS_FACTOR, or lower LEARNING_RATE",
    ),
}


@dataclasses.dataclass
class _State:
    """How long a condition has held, or not, in each layer.

    Attributes:
        bad: looks in a row at which it held.
        good: looks in a row at which it did not.
        began: step at which it began to hold.
        is_told: whether it is known to the user.
    """

    bad: np.ndarray
    good: np.ndarray
    began: np.ndarray
    is_told: np.ndarray

    @classmethod
    def of(cls, layers: int) -> "_State":
        """Returns that of a condition that holds nowhere."""
        bad, good, began = np.zeros((3, layers), int)
        return cls(bad, good, began, np.zeros(layers, bool))


@dataclasses.dataclass(frozen=True)
class Alarm:
    """A condition that begins, or is over.

    Attributes:
        kind: what is wrong.
        layers: sparse layers in which it began, from 0; () where it is over.
        since: step from which on it has held, or has not.
        words: the same in a sentence, with numbers and what helps.
    """

    kind: str
    layers: tuple[int, ...]
    since: int
    words: str


class Health:
    """Looks at the routers of a run now and then.

    Args:
        hashed: whether a table chooses, of each sparse layer; () where none does.
    """

    def __init__(self, hashed: Sequence[bool] = ()) -> None:
        self._hashed = np.array(hashed, bool)
        self._states: dict[str, _State] = {}
        self._steps: list[int] = []  # of the looks
        self._alive: np.ndarray | None = None  # number of the look with tokens

    def look(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Returns what begins, and what is over.

        Args:
            step: step that the metrics are of.
            metrics: what the step returned, on the host; "router/load" is [layers,
                experts], shares of a layer's choices, NaN for experts that a layer has
                not.
        """
        if "router/load" not in metrics:  # a dense model
            return []
        self._steps.append(step)
        found = []
        for kind, value_P in self._measured(metrics).items():
            state = self._states.setdefault(kind, _State.of(len(value_P)))
            found += self._judged(kind, state, step, value_P)
        return found

    def _measured(self, metrics: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A number for each layer, or one of all, by the name of the condition."""
        load_PE = np.asarray(metrics["router/load"], float)
        there_PE = ~np.isnan(load_PE)
        load_PE = np.where(there_PE, load_PE, 0)
        experts_P = there_PE.sum(axis=1)

        def of(name: str) -> np.ndarray:
            return np.atleast_1d(np.asarray(metrics[f"router/{name}"], float))

        even_P = np.log(np.maximum(experts_P, 2))
        entropy_P = 100 * of("entropy_nats_per_layer") / even_P
        if self._hashed.any():  # a table has no probabilities
            entropy_P = np.where(self._hashed, 100, entropy_P)
        return {
            "drops": 100 * of("dropped_fraction_per_layer"),
            "tokens without an expert": 100 * of("tokens_without_expert_fraction"),
            "uneven load": load_PE.max(axis=1) * experts_P,
            "dead experts": self._dead(load_PE > 0, there_PE),
            "entropy collapse": entropy_P,
            "large logits": of("logit_rms"),
        }

    def _dead(self, has_tokens_PE: np.ndarray, there_PE: np.ndarray) -> np.ndarray:
        """How many experts of each layer have had no token for many looks."""
        look = len(self._steps)
        if self._alive is None:
            self._alive = np.full(has_tokens_PE.shape, look - 1)
        self._alive[has_tokens_PE] = look
        return ((look - self._alive >= _DEAD_LOOKS) & there_PE).sum(axis=1)

    def _judged(
        self, kind: str, state: _State, step: int, value_P: np.ndarray
    ) -> list[Alarm]:
        """What begins or is over of one condition."""
        bad_P = _KINDS[kind].is_bad(value_P)
        state.began = np.where(bad_P & (state.bad == 0), step, state.began)
        state.bad = np.where(bad_P, state.bad + 1, 0)
        state.good = np.where(bad_P, 0, state.good + 1)
        new_P = (state.bad >= _LOOKS) & ~state.is_told
        was_told = state.is_told.any()
        state.is_told = (state.is_told | new_P) & (state.good < _LOOKS)
        if new_P.any():
            layers = np.flatnonzero(new_P)
            since = int(state.began[layers].min())
            if kind == "dead experts":  # they died before they were missed
                since = self._steps[max(len(self._steps) - _LOOKS - _DEAD_LOOKS, 0)]
            return [_begun(kind, layers, since, value_P)]
        if was_told and not state.is_told.any():
            since = self._steps[-_LOOKS]
            return [Alarm(kind, (), since, f"{kind}: over since step {since:,}")]
        return []


def _begun(kind: str, layers: np.ndarray, since: int, value_P: np.ndarray) -> Alarm:
    """Says what begins, by the layer in which it is worst."""
    sign = -1 if kind == "entropy collapse" else 1
    worst = max(layers.tolist(), key=lambda layer: sign * value_P[layer])
    words = _KINDS[kind].words.format(value_P[worst])
    if len(value_P) > 1:
        words += f" in sparse layer {worst}"
    if len(layers) > 1:
        words += f", the worst of {len(layers)}"
    words += f", since step {since:,}: {_KINDS[kind].remedy}"
    return Alarm(kind, tuple(layers.tolist()), since, words)
