"""Exit codes, and the errors that are messages to the user."""

import difflib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_USER_ERROR = 1
EXIT_NON_FINITE = 17
EXIT_PREEMPTED = 42
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
EXIT_STALLED = 75  # EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # the shell's own code for Ctrl-C
EXIT_LOST_PROCESS = 134  # as jax ends when a process of its job is gone

# What a supervisor needs to know of each; help and the README say the same words.
EXIT_CODES = {
    EXIT_DONE: "done",
    EXIT_USER_ERROR: "an error of usage, configuration or data: do not restart",
    EXIT_NON_FINITE: "too many steps in a row were not finite: do not restart",
    EXIT_PREEMPTED: "preempted, and saved: restart the same command",
    EXIT_FAULT: "a fault of Switchyard, of a library or of a machine: the same command "
    "may be restarted",
    EXIT_STALLED: "a step took longer than STEP_TIMEOUT: the same command may be "
    "restarted",
    EXIT_INTERRUPTED: "interrupted at the keyboard",
    EXIT_LOST_PROCESS: "another process of the job was lost: restart the same command "
    "for all",
}

_OURS = frozenset({"launch", "moe", "partitioning", "tasks"})


class UserError(Exception):
    """Something the user can put right; the message says how."""


class UsageError(UserError):
    """A command line that cannot be understood."""


class ProcessError(UserError):
    """The processes of a job do not find one another, or do not agree."""


class ConfigError(UserError):
    """Every fault of a configuration, in one message.

    Args:
        where: the files, as the user named them.
        problems: one line each: the value given, the rule, and what to change.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.where = where
        self.problems = tuple(problems)
        noun = "problem" if len(self.problems) == 1 else "problems"
        lines = [f"{len(self.problems)} {noun} in {where}", *self.problems]
        super().__init__("\n  ".join(lines))


def is_user_error(error: BaseException) -> bool:
    """Says whether an error is shown as one message, without a traceback.

    An exception class that this repository defines is a message to the user: our own
    invariants are assertions.
    """
    return any(
        kind.__module__.partition(".")[0] in _OURS for kind in type(error).__mro__
    )


def is_utf8(text: str) -> bool:
    """Whether text can be written to a file: a byte that is none, or half, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns "; nearest: ..." to end a message with, or "" if nothing is near."""
    by_upper = {other.upper(): other for other in known}
    close = difflib.get_close_matches(name.upper(), by_upper, n=3, cutoff=0.6)
    return (
        f"; nearest: {', '.join(by_upper[other] for other in close)}" if close else ""
    )
