"""Activations in the words of config.json, and in ours."""

_OURS = {
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "relu": "relu",
    "relu2": "relu_squared",
}
_THEIRS = {"gelu_exact": "gelu", "gelu": "gelu_new", "relu": "relu"} | {
    "relu_squared": "relu2"
}


def activation_knob(theirs: str) -> str:
    """Returns ACTIVATION of a feed-forward without a gate.

    Raises:
        ValueError: it is of a kind that is not known.
    """
    if theirs not in _OURS:
        raise ValueError(f"activation {theirs!r}: known are {', '.join(_OURS)}")
    return _OURS[theirs]


def activation_of(ours: str) -> str:
    """Returns their word for an ACTIVATION; that of no other where it has a gate."""
    return _THEIRS.get(ours, ours)
