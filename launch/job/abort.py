"""jax ends a process by `abort` when its coordinator is gone; here it waits first.

Its client does so from a thread of its own, in the same moment in which our own lines
hear of it, and nothing in jax can be told otherwise: whoever is faster would decide
between a message with exit code 134 and a stack of C++ with signal 6.
"""

import contextlib
import ctypes
import signal


def hold_aborts() -> None:
    """Has a thread that aborts sleep six seconds before it ends the process.

    Time for the other threads to end it by what they know. What handles the signal is
    the C library's own `sleep`, which takes the signal's number for seconds. It needs
    no lock and no memory, so it is safe in a process that is broken for another
    reason; that one ends by the signal, six seconds later. Whoever handles aborts
    already, such as `python -X faulthandler`, keeps doing so.
    """
    with contextlib.suppress(AttributeError):  # a C library without them
        library = ctypes.CDLL(None)
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        library.signal.restype = ctypes.c_void_p
        sleep = ctypes.cast(library.sleep, ctypes.c_void_p)
        before = library.signal(signal.SIGABRT, sleep)
        if before:  # SIG_DFL is a null pointer
            library.signal(signal.SIGABRT, before)
