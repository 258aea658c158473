"""What a configuration may name that is not Switchyard's.

Read before jax is imported: standard library only.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NewType

if TYPE_CHECKING:
    from moe.settings.router import RouterSettings

# "module:name" of code outside Switchyard, as in "my_lab.routers:soft".
Named = NewType("Named", str)


class Options(Mapping[str, Any]):
    """Options by name: numbers, texts, True, False, and tuples of them.

    It can be hashed, since settings are static where jax traces.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self._options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in (options or {}).items()
        }

    def __getitem__(self, name: str) -> Any:
        """Returns the value of an option."""
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        """Goes through the names."""
        return iter(self._options)

    def __len__(self) -> int:
        """Counts the options."""
        return len(self._options)

    def __hash__(self) -> int:
        """Options that are equal, in whatever order, have the same hash."""
        return hash(frozenset(self._options.items()))

    def __repr__(self) -> str:
        """Shows them as a gin file does."""
        return repr(self._options)


# Metadata of a field for what a name stands for: it is filled in at the start.
NO_KNOB: Mapping[str, Any] = {"knob": False}
NO_OPTIONS = Options()


@dataclasses.dataclass(frozen=True)
class Router:
    """A router of your own, and what the rest of Switchyard must know of it.

    Attributes:
        route: function (logits_GSE, context, settings, *, capacity, **options) that
            returns an Assignment; ROUTER_OPTIONS are its further arguments.
        causal: whether what becomes of a token never depends on later ones of its
            group. If not, decoders need ALLOW_FUTURE_LEAK.
        reads_logits: whether there are logits. Without, no weights are made for them,
            and those that it is given are zero.
        num_choices: function (settings, num_experts) of J, choices that a token may
            hold; None for K, NUM_SELECTED_EXPERTS.
    """

    route: Callable[..., Any]
    causal: bool
    reads_logits: bool = True
    num_choices: Callable[["RouterSettings", int], int] | None = None
