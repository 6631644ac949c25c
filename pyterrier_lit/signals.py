"""Restores the signal handlers of a JVM after another library replaced them.

A JVM raises SIGSEGV, SIGBUS, SIGFPE and SIGILL in normal operation and handles them itself. If another library has
replaced the JVM's handlers of these signals, the process soon dies. One such library is Ray, which enables Python's
faulthandler.
"""

import ctypes
import faulthandler
import os
import signal
import sys

JAVAS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL")
# Size of a buffer in bytes, larger than struct sigaction on any system. The struct begins with the handler's address
SIZE = 512


class _Symbol(ctypes.Structure):
    """The result of dladdr for an address. Its first field is the file name of the library that contains the
    address."""

    _fields_ = (("library", ctypes.c_char_p), *((name, ctypes.c_void_p) for name in ("base", "name", "address")))


def jvm() -> bool:
    """Whether this process has the JVM that PyTerrier starts: whether the library jnius is imported."""
    return "jnius" in sys.modules


def back_to_java() -> bool:
    """Let the JVM of this process handle its signals again, by disabling Python's faulthandler. Returns whether the JVM
    now handles them."""
    if os.name != "posix" or _are_javas():
        return True
    faulthandler.disable()  # restores the handlers from before it was enabled
    return _are_javas()


def _are_javas() -> bool:
    return all("jvm" in library(handler(getattr(signal, name))) for name in JAVAS)


def handler(number: int) -> int:
    """The address of a signal's handler; 0 is the system's default handler. number: the number of the signal."""
    action = ctypes.create_string_buffer(SIZE)
    ctypes.CDLL(None).sigaction(number, None, action)
    return ctypes.c_void_p.from_buffer(action).value or 0


def library(address: int) -> str:
    """The file name of the library that contains an address, or "" if no library contains it."""
    symbol = _Symbol()
    found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol))
    return os.path.basename(symbol.library.decode()) if found and symbol.library else ""
