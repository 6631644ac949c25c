"""The signals that a JVM lives by, given back to it where Ray takes them. Knows neither Terrier nor Ray.

A JVM raises SIGSEGV, SIGBUS, SIGFPE and SIGILL in its normal course and handles them itself. Where somebody else
handles them the process dies in one of the JVM's next steps.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator

NAMES = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP")
SIZE = 512  # bytes, more than any system's struct sigaction; the handler is the first field


class _Symbol(ctypes.Structure):
    """What dladdr tells: first the library in which an address lies."""

    _fields_ = (("library", ctypes.c_char_p), *((name, ctypes.c_void_p) for name in ("base", "name", "address")))


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Who handles the signals now handles them afterwards, and Python's faulthandler is on only if it was before."""
    actions, faults = _actions(), faulthandler.is_enabled()
    try:
        yield
    finally:
        if faulthandler.is_enabled() and not faults:
            faulthandler.disable()
        for number, action in actions.items():
            ctypes.CDLL(None).sigaction(number, action, None)


def jvm() -> bool:
    """Whether a JVM runs in this process, as far as PyTerrier's way to it is concerned."""
    return "jnius" in sys.modules


def back_to_java() -> bool:
    """Whether the JVM of this process handles its signals, perhaps after Python's faulthandler has given them back."""
    if _are_javas():
        return True
    faulthandler.disable()  # puts back what stood before it was enabled
    return _are_javas()


def _are_javas() -> bool:
    return all("jvm" in _library(action) for number, action in _actions().items() if number != signal.SIGTRAP)


def _actions() -> dict[int, ctypes.Array[ctypes.c_char]]:
    """Of each signal how it is handled, as the C library gives it. Nothing on Windows."""
    actions = {}
    for number in [getattr(signal, name) for name in NAMES if os.name == "posix" and hasattr(signal, name)]:
        actions[number] = ctypes.create_string_buffer(SIZE)
        ctypes.CDLL(None).sigaction(number, None, actions[number])
    return actions


def _library(action: ctypes.Array[ctypes.c_char]) -> str:
    """The file name of the library in which a handler lies; nothing for the system's default."""
    symbol, handler = _Symbol(), ctypes.c_void_p.from_buffer(action)
    found = handler.value and ctypes.CDLL(None).dladdr(handler, ctypes.byref(symbol))
    return os.path.basename(symbol.library.decode()) if found and symbol.library else ""
