"""Reads gin files into Settings.

`base.gin` lists every knob, an upper-case macro, with its default; all other files, the
leaves, give values to macros and include other leaves. There is no global state.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch.config import places
from launch.config.macros import RENAMED, T5X, bound
from launch.config.rules import problems
from launch.config.settings import Settings
from launch.config.syntax import (
    REQUIRED,
    Binding,
    Block,
    Fault,
    Import,
    Include,
    MacroUse,
    Reference,
    parts,
    statements,
)
from launch.config.types import annotation, fill, fit, is_text, stand_in
from launch.errors import ConfigError, is_utf8, nearest
from tasks.ramp import problems as ramp_problems
from tasks.ramp import sizes

_BASE = "configs/base.gin"
_MOST_FAULTS = 5  # unreadable statements in one file, before reading stops
_MACRO = re.compile(r"[A-Z][A-Z0-9_]*")
# What a file in a folder of this name says all of: sections of `base.gin`.
_KINDS = {
    "models": ("the model", "the sparse layers"),
    "hardware": ("the hardware",),
}
_PATHS = (
    "MODEL_DIR",
    "START_FROM",
    "STORE_DIR",
    "VOCABULARY",
    "COMPILATION_CACHE_DIR",
)
_WHAT_TO_GIVE = {
    "MODEL_DIR": "the folder of the run, such as 'runs/mine'",
    "STORE_DIR": "the folder of the tokens, such as 'runs/stores/mine'",
}


class Knob(NamedTuple):
    """A macro, its final value, and the place that set it.

    Attributes:
        macro: its name.
        value: what it comes to.
        origin: file and line, or the command line.
        same_as: the macro whose value it takes, unless told otherwise; "" for none.
    """

    macro: str
    value: Any
    origin: str
    same_as: str = ""

    @property
    def text(self) -> str:
        """Gin text of the value."""
        return f"%{self.same_as}" if self.same_as else repr(self.value)


@dataclasses.dataclass(frozen=True)
class ResolvedConfig:
    """A configuration that obeys every rule.

    Attributes:
        settings: the records of a run.
        knobs: every macro in the order of `base.gin`.
        operative: gin text that reads back as the same settings; it is kept beside
            the checkpoints.
        where: the files as the user named them.
        notes: what a reader of the files may not expect.
    """

    settings: Settings
    knobs: tuple[Knob, ...]
    operative: str
    where: str
    notes: tuple[str, ...] = ()


def read(files: Sequence[str], bindings: Sequence[str] = ()) -> ResolvedConfig:
    """Reads `base.gin`, then the files, then the bindings; what is later wins.

    Args:
        files: gin files, sought in the working directory, then in `configs`; an
            include is sought beside its file first, and one of ours in `configs` only.
        bindings: "MACRO=value", as given after `--gin.` on the command line; text
            may stand there without quotes.
    Returns:
        The settings, and where each of them was set.
    Raises:
        ConfigError: every fault that was found, each with its place.
    """
    reader = _Reader()
    reader.read_base()
    for name in files:
        reader.read_leaf(name)
    for binding in bindings:
        reader.read_binding(binding)
    settings, knobs = reader.finish()
    where = ", ".join(files) or "the command line"
    if reader.problems:
        raise ConfigError(where, reader.problems)
    operative = _operative(knobs, where)
    return ResolvedConfig(settings, knobs, operative, where, tuple(reader.notes))


def _operative(knobs: Iterable[Knob], where: str) -> str:
    lines = [f"# Every knob of this run, as read from {where!r}."]
    lines += [
        # A file's name cannot add a line of its own.
        f"{knob.macro} = {knob.text}  # {' '.join(knob.origin.split())}"
        for knob in knobs
    ]
    return "\n".join(lines) + "\n"


class _Assigned(NamedTuple):
    value: Any
    origin: str


class _Reader:
    """What has been read so far, and every fault in it."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._assigned: dict[str, _Assigned] = {}
        self._default: dict[str, _Assigned] = {}
        self._bound: dict[str, str] = {}  # "model.num_layers" -> "NUM_LAYERS"
        self._kind_of: dict[str, str] = {}  # macro -> folder of files that say it
        self._set_by: dict[str, set[str]] = {kind: set() for kind in _KINDS}
        self._faulty: set[str] = set()  # macros whose value was not legible
        self._lost_a_file = False

    # ------------------------------------------------------------------- reading

    def read_base(self) -> None:
        """Reads the list of knobs; a fault in it is ours."""
        text = places.base()
        kind_of = {title: kind for kind, titles in _KINDS.items() for title in titles}
        self._kind_of = {
            macro: kind_of.get(title, "") for macro, title in places.sections().items()
        }
        for statement in statements(text):
            assert isinstance(statement, Binding), statement
            macro, line = statement.selector, statement.location.line_num
            assert not statement.arg_name, statement
            assert macro not in self._assigned, f"{macro} is listed twice"
            origin = f"{_BASE}:{line} (default)"
            self._assigned[macro] = _Assigned(statement.value, origin)
        self._default = dict(self._assigned)
        self._bound = bound(self._default)
        unused = self._default.keys() - set(self._bound.values())
        assert not unused, f"{sorted(unused)} fill no setting"

    def read_leaf(
        self,
        name: str,
        folder: Path | None = None,
        place: str = "",
        open_files: tuple[Path, ...] = (),
    ) -> set[str]:
        """Reads a file and what it includes; returns the macros that were set.

        Args:
            name: as written in the command line or in an `include`.
            folder: that of the including file.
            place: where the `include` stands, for messages: "file:line: ".
            open_files: the files that are being read, to find a cycle.
        """
        path = self._find(name, folder, place)
        text = None if path is None else self._text(path, place, open_files)
        if path is None or text is None:
            return set()
        shown = places.shown(path)
        kind = path.parent.name if path.parent.name in _KINDS else ""
        set_here: dict[str, int] = {}
        set_by_includes: set[str] = set()
        if kind and all(other.parent.name != kind for other in open_files):
            set_by_includes |= self._reset(kind, shown)
        open_files = (*open_files, path.resolve())
        faults = 0
        for statement in statements(text):
            faults += isinstance(statement, Fault)
            if faults > _MOST_FAULTS:
                self.problems.append(
                    f"{shown}: and more of the same: is it a gin file?"
                )
                self._lost_a_file = True
                break
            if isinstance(statement, Include):
                line = statement.location.line_num
                at = f"{shown}:{line}: "
                included = self.read_leaf(
                    statement.filename, path.parent, at, open_files
                )
                set_by_includes |= included
                for macro in sorted(included & set_here.keys()):
                    self.problems.append(
                        f"{at}this include sets {macro} again, after line "
                        f"{set_here[macro]}: put includes first"
                    )
            else:
                self._read_statement(statement, shown, set_here)
        if kind:
            self._set_by[kind] |= set_here.keys()
        return set_by_includes | set_here.keys()

    def _reset(self, kind: str, shown: str) -> set[str]:
        """Returns knobs to their defaults before a file says all of its kind."""
        changed = {
            macro
            for macro, default in self._default.items()
            if self._assigned[macro] != default
            and (self._kind_of[macro] == kind or macro in self._set_by[kind])
        }
        others = sorted(changed - self._set_by[kind])
        if others:
            self.notes.append(
                f"{shown} says all of its {kind}: {', '.join(others)} of the files "
                "before it no longer hold"
            )
        self._assigned |= {macro: self._default[macro] for macro in changed}
        self._faulty -= changed
        self._set_by[kind].clear()
        return changed

    def _text(self, path: Path, place: str, open_files: tuple[Path, ...]) -> str | None:
        """What is in a file; None, and a problem, if it cannot be read here."""
        shown = places.shown(path)
        if path.resolve() == (places.configs() / "base.gin").resolve():
            self.problems.append(
                f"{place}{shown} is always read first: take it out of the files to read"
            )
        elif path.resolve() in open_files:
            self.problems.append(f"{place}{shown} includes itself")
        else:
            try:
                return path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                kind = getattr(error, "strerror", None) or "it is not text"
                self.problems.append(f"{place}{shown} cannot be read: {kind}")
                self._lost_a_file = True
        return None

    def _find(self, name: str, folder: Path | None, place: str) -> Path | None:
        found = places.find(name, folder)
        if isinstance(found, Path):
            return found
        self._lost_a_file = True
        self.problems.append(f"{place}{found}")
        return None

    def _read_statement(
        self, statement: Any, shown: str, set_here: dict[str, int]
    ) -> None:
        """Takes one statement of a leaf that is not an include."""
        if isinstance(statement, Fault):
            named = f"{statement.macro}: " if statement.macro in self._default else ""
            self._faulty.add(statement.macro)
            self.problems.append(f"{shown}:{statement.line}: {named}{statement.reason}")
            return
        line = statement.location.line_num
        at = f"{shown}:{line}"
        if isinstance(statement, Import):
            self.problems.append(f"{at}: a gin file cannot import; it only sets macros")
            return
        if isinstance(statement, Block):
            return  # each binding in the block follows, and is refused by name
        macro = statement.selector
        if not self._may_set(statement, at):
            self._faulty.add(macro)
        elif macro in set_here:
            self.problems.append(
                f"{at}: {macro} is set a second time, after line {set_here[macro]}"
            )
        else:
            set_here[macro] = line
            self._assign(macro, statement.value, at)

    def _assign(self, macro: str, value: Any, origin: str) -> None:
        """Gives a macro its value; of two that say one thing the later one holds."""
        self._assigned[macro] = _Assigned(value, origin)
        if macro == "TRAIN_STEPS":
            self._assigned["TRAIN_TOKENS"] = self._default["TRAIN_TOKENS"]

    def _may_set(self, statement: Binding, at: str) -> bool:
        """Whether the statement gives a value to a macro that exists."""
        macro = statement.selector
        if statement.scope:
            fault = "a gin file here has no scopes; it only sets macros"
        elif statement.arg_name:
            dotted = f"{macro}.{statement.arg_name}"
            fault = f"{dotted}: a gin file sets macros only"
            if dotted in self._bound:
                fault += f"; set the macro {self._bound[dotted]} instead"
                self._faulty.add(self._bound[dotted])
            else:
                fault += nearest(statement.arg_name, self._default)
        elif macro not in self._default:
            fault = self._unknown(macro)
        elif any(isinstance(part, Reference) for part in parts(statement.value)):
            fault = f"{macro}: an @reference; a value is a literal or %OTHER_MACRO"
        else:
            return True
        self.problems.append(f"{at}: {fault}")
        return False

    def _unknown(self, macro: str) -> str:
        if macro in RENAMED:
            return f"{macro} is called {RENAMED[macro]} now"
        if macro in T5X:
            return f"{macro} is not a knob; here T5X's is {T5X[macro]}"
        return f"{macro} is not a knob{nearest(macro, self._default)}"

    def read_binding(self, binding: str) -> None:
        """Takes "MACRO=value" from the command line."""
        name, equals, value = binding.partition("=")
        if name != name.strip():  # "MACRO = value", as in a file
            name, value = name.strip(), value.lstrip()
        at = f"--gin.{name}"
        if not equals:
            self.problems.append(f"{at}: write {at}=value")
            return
        if _MACRO.fullmatch(name) and name not in self._default:
            self.problems.append(f"{at}: {self._unknown(name)}")
            return
        if not is_utf8(binding):
            self._faulty.add(name)
            self.problems.append(f"{at}: {value!r} is not UTF-8")
            return
        read = list(statements(f"{name} = {value}\n"))
        statement: Any = read[0] if len(read) == 1 else None
        parsed = isinstance(statement, Binding)
        if parsed and not statement.scope and not statement.arg_name:
            parsed = statement.selector == name  # a value may hold lines of its own
        quoted = parsed and isinstance(statement.value, str | MacroUse)
        if self._is_text(name) and not quoted and value[:1] not in ("'", '"', "%"):
            # A shell takes quotes away, so text needs none here.
            self._assign(name, value, at)
        elif not parsed:
            self._faulty.add(name)
            fault = statement if isinstance(statement, Fault) else None
            reason = fault.reason if fault else "this is not one value"
            self.problems.append(f"{at}: {reason}")
        elif self._may_set(statement, at):
            self._assign(name, statement.value, at)
        else:
            self._faulty.add(name)

    def _is_text(self, macro: str) -> bool:
        return any(
            is_text(annotation(setting))
            for setting, bound in self._bound.items()
            if bound == macro
        )

    # ------------------------------------------------------------------ resolving

    def finish(self) -> tuple[Settings, tuple[Knob, ...]]:
        """Fills the records, and adds every fault of value or rule to `problems`.

        Where a value is at fault the default stands in for it, so that the rules can
        still be checked; what they would say of a stand-in is left out.
        """
        values, missing = self._resolved()
        fields, said = {}, set()
        for setting, macro in self._bound.items():
            kind, given = annotation(setting), self._assigned[macro].value
            try:
                if isinstance(given, MacroUse) and given.name in said:
                    values.pop(macro, None)  # its fault is that of the other
                fields[setting] = fit(values[macro], kind)
                if macro in _PATHS:
                    fields[setting] = os.path.expanduser(fields[setting])
                if macro in _WHAT_TO_GIVE and not fields[setting].strip():
                    raise ValueError(f"is empty: give {_WHAT_TO_GIVE[macro]}")
                values[macro] = fields[setting]
            except KeyError:
                fields[setting] = self._stand_in(macro, kind)
            except ValueError as error:
                fields[setting] = self._stand_in(macro, kind)
                given, origin = values.pop(macro), self._assigned[macro].origin
                self.problems.append(f"{origin}: {macro} = {given!r} {error}")
                said.add(macro)
        settings = self._in_steps(fill(fields), values)
        if not self._lost_a_file:
            if missing:
                self.problems.append(
                    f"no value for {', '.join(missing)}, which no default would suit: "
                    f"set each in a gin file, or as --gin.{missing[0]}=..."
                )
            unknown = self._default.keys() - values.keys() | self._faulty
            if "TASK_FEATURE_LENGTHS" in unknown:
                unknown.add("GROUP_SIZE")  # its rule compares it with the length
            self.problems += [
                problem
                for problem in problems(settings)
                if unknown.isdisjoint(_MACRO.findall(problem))
            ]
        knobs = tuple(
            Knob(macro, values[macro], assigned.origin, self._followed(macro))
            for macro, assigned in self._assigned.items()
            if macro in values
        )
        return settings, knobs

    def _in_steps(self, settings: Settings, values: dict[str, Any]) -> Settings:
        """Counts the steps that read TRAIN_TOKENS."""
        if settings.train.train_tokens <= 0:
            return settings
        rows = -(-settings.train.train_tokens // max(settings.data.tokens_per_row, 1))
        size, ramp = settings.train.batch_size, settings.train.batch_ramp
        if size < 1 or ramp_problems(size, ramp):
            ramp, size = (), max(size, 1)  # which is a problem of its own
        steps = sizes(size, ramp).batches(rows)
        values["TRAIN_STEPS"] = steps
        origin = f"TRAIN_TOKENS, {self._assigned['TRAIN_TOKENS'].origin}"
        self._assigned["TRAIN_STEPS"] = _Assigned(steps, origin)
        train = dataclasses.replace(settings.train, train_steps=steps)
        return dataclasses.replace(settings, train=train)

    def _resolved(self) -> tuple[dict[str, Any], list[str]]:
        """Returns the values of macros, %OTHER resolved, and which have none."""
        values: dict[str, Any] = {}
        missing: list[str] = []
        for macro, assigned in self._assigned.items():
            try:
                values[macro] = self._resolve(assigned.value, (macro,))
            except KeyError:
                if assigned.value == REQUIRED and macro not in self._faulty:
                    missing.append(macro)
            except ValueError as error:
                self.problems.append(f"{assigned.origin}: {macro}: {error}")
        return values, missing

    def _resolve(self, value: Any, path: tuple[str, ...]) -> Any:
        """Raises KeyError for a value that is missing, ValueError for a faulty one."""
        if value == REQUIRED:
            raise KeyError(path[-1])
        if isinstance(value, MacroUse):
            if value.name in path:
                raise ValueError(
                    f"refers to itself: {' -> '.join(path)} -> {value.name}"
                )
            if value.name not in self._assigned:
                hint = nearest(value.name, self._default)
                raise ValueError(f"%{value.name} is not a knob{hint}")
            return self._resolve(self._assigned[value.name].value, (*path, value.name))
        if isinstance(value, dict):
            return {
                self._resolve(k, path): self._resolve(v, path) for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self._resolve(item, path) for item in value)
        return value

    def _stand_in(self, macro: str, kind: Any) -> Any:
        default = self._default[macro].value
        if default == REQUIRED:
            return stand_in(kind)
        if isinstance(default, MacroUse):
            return self._stand_in(default.name, kind)
        return fit(default, kind)

    def _followed(self, macro: str) -> str:
        """The macro that this one takes its value from, if it is left as it was."""
        default = self._default[macro].value
        follows = isinstance(default, MacroUse) and default != REQUIRED
        return (
            default.name if follows and self._assigned[macro].value == default else ""
        )
