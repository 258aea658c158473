"""Keeps libraries that write to the error stream by themselves from doing so."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

_STDERR = 2


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Holds back all that is written to file descriptor 2, also by C++ code.

    If the block raises, what was held back is written after all: it may be the cause.
    """
    sys.stderr.flush()
    try:
        before = os.dup(_STDERR)
    except OSError:  # this process has no error stream
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        except BaseException:
            _restore(before)
            held.seek(0)
            os.write(_STDERR, held.read())
            raise
        else:
            _restore(before)


def _restore(before: int) -> None:
    sys.stderr.flush()
    os.dup2(before, _STDERR)
    os.close(before)
