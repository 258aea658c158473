"""The metrics of several steps, merged into those of all of them.

Counts are added up; means are weighted by what they are means of, tokens or choices;
the greatest of greatest is kept; and of what is a state, such as the learning rate, the
last. A step that was skipped since it was not finite is in none of these: it taught
nothing, and one NaN would hide all the others.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.records.loads import LOAD

Record = dict[str, Any]
Metrics = Mapping[str, Any]

_LEDGER = "ledger/"
_SUMMED = ("loss/target_tokens", "router/over_budget_rows")
_GREATEST = (
    "router/max_violation",
    "attention/max_logit",
    "attention/clipped_heads",
)
_IN_A_ROW = "state/skipped_in_a_row"  # the greatest too, of steps that were skipped
_LAST = (
    "optimizer/learning_rate",
    "optimizer/parameter_norm",
    "state/taken",
    "state/skipped_steps",
)
# Made of the ledger or of the merged loads instead of other steps' values.
_DERIVED = (
    "router/dropped_fraction",
    "router/dropped_fraction_per_layer",
    "router/spilled_fraction",
    "router/tokens_without_expert_fraction",
    "router/entropy_nats",
    "router/dead_experts",
)
_ROOT_MEAN_SQUARE = "router/logit_rms"
_ENTROPY = "router/entropy_nats_per_layer"


class Merged:
    """Takes the metrics of one step after the other, as the train step returns them.

    Attributes:
        steps: how many it has taken.
        skipped: how many of them were skipped.
    """

    def __init__(self) -> None:
        self.steps = self.skipped = 0
        self._learnt, self._skipped = _Sums(), _Sums()
        self._state: Record = {}

    def add(self, metrics: Metrics) -> None:
        """Adds a step.

        Args:
            metrics: numbers and arrays of the host, those of the ledger by layer.
        """
        skipped = bool(metrics[_IN_A_ROW])
        self.steps += 1
        self.skipped += skipped
        (self._skipped if skipped else self._learnt).add(metrics)
        in_a_row = max(int(metrics[_IN_A_ROW]), self._state.get(_IN_A_ROW, 0))
        last = {name: metrics[name] for name in _LAST if name in metrics}
        self._state = {name: np.asarray(value).tolist() for name, value in last.items()}
        self._state[_IN_A_ROW] = in_a_row

    def record(self) -> Record:
        """Returns what all steps amount to: numbers, lists by layer, and the loads.

        Where every step was skipped, it is what they had.
        """
        only_skipped = self.skipped == self.steps
        found = (self._skipped if only_skipped else self._learnt).record()
        counts = {"state/steps": self.steps, "state/steps_skipped": self.skipped}
        return found | self._state | counts


class _Sums:
    """Weighted sums of metrics, and their weights."""

    def __init__(self) -> None:
        self._summed: dict[str, Any] = {}
        self._weight: dict[str, Any] = {}
        self._greatest: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        """Adds a step."""
        for name, value in metrics.items():
            if name in _DERIVED or name in _LAST or name == _IN_A_ROW:
                continue
            if name in _GREATEST:
                known = self._greatest.get(name, value)
                self._greatest[name] = float(max(known, value))
            elif name.startswith(_LEDGER) or name in _SUMMED:
                self._summed[name] = self._summed.get(name, 0) + _whole(value)
            else:
                weight = _weight(name, metrics)
                value = np.asarray(value, np.float64)
                if name == _ROOT_MEAN_SQUARE:
                    value = value**2
                self._summed[name] = self._summed.get(name, 0.0) + value * weight
                self._weight[name] = self._weight.get(name, 0.0) + weight

    def record(self) -> Record:
        """Returns sums, means and fractions."""
        values = {
            name: total / np.where(self._weight[name] > 0, self._weight[name], 1)
            if name in self._weight
            else total
            for name, total in self._summed.items()
        }
        if _ROOT_MEAN_SQUARE in values:
            values[_ROOT_MEAN_SQUARE] = np.sqrt(values[_ROOT_MEAN_SQUARE])
        values |= self._greatest | _derived(values)
        return {
            # Counts of layers are added up here, where integers have no bounds.
            name: sum(np.atleast_1d(value).tolist())
            if name.startswith(_LEDGER)
            else value
            if name == LOAD
            else np.asarray(value).tolist()
            for name, value in values.items()
        }


def _derived(values: Metrics) -> Record:
    """What follows from sums and means of the layers."""
    if "ledger/dropped_choices" not in values:
        return {}
    dropped_P = values["ledger/dropped_choices"]
    chosen_P = dropped_P + values["ledger/computed_choices"]
    chosen = max(np.sum(chosen_P), 1)
    found = {
        "router/dropped_fraction": np.sum(dropped_P) / chosen,
        "router/dropped_fraction_per_layer": dropped_P / np.maximum(chosen_P, 1),
        "router/spilled_fraction": np.sum(values["ledger/spilled_choices"]) / chosen,
        "router/tokens_without_expert_fraction": (
            np.sum(values["ledger/tokens_without_expert"])
            / max(np.sum(values["ledger/tokens"]), 1)
        ),
    }
    if _ENTROPY in values:
        found["router/entropy_nats"] = np.mean(values[_ENTROPY])
    if LOAD in values:
        found["router/dead_experts"] = np.count_nonzero(values[LOAD] == 0)
    return found


def _weight(name: str, metrics: Metrics) -> Any:
    """What a metric is a mean of: choices or tokens, of each layer or of all."""
    if name == LOAD:
        chosen = metrics["ledger/dropped_choices"] + metrics["ledger/computed_choices"]
        return np.asarray(chosen, np.float64)[:, None]
    if name == _ENTROPY:
        return np.asarray(metrics["ledger/tokens"], np.float64)
    if name == _ROOT_MEAN_SQUARE:
        return float(np.sum(metrics["ledger/tokens"]))
    if name.startswith(("loss/", "accuracy/")):
        return float(metrics["loss/target_tokens"])
    return 1.0


def _whole(value: Any) -> Any:
    """Counts as integers that do not overflow."""
    value = np.asarray(value)
    return value.astype(np.int64) if value.dtype.kind in "iu" else value
