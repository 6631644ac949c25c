"""The signals that a JVM lives by, given back to it where another library took them. Knows neither Terrier nor Ray.

A JVM raises SIGSEGV, SIGBUS, SIGFPE and SIGILL in its normal course and handles them itself. Where somebody else
handles them the process dies in one of the JVM's next steps.
"""

import ctypes
import faulthandler
import os
import signal
import sys

JAVAS = ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL")
SIZE = 512  # bytes, more than any system's struct sigaction; its first field is the handler's address


class _Symbol(ctypes.Structure):
    """What dladdr tells of an address: first the library in which it lies."""

    _fields_ = (("library", ctypes.c_char_p), *((name, ctypes.c_void_p) for name in ("base", "name", "address")))


def jvm() -> bool:
    """Whether a JVM runs in this process, as PyTerrier starts one."""
    return "jnius" in sys.modules


def back_to_java() -> bool:
    """Whether the JVM of this process handles its signals, perhaps after Python's faulthandler has given them back."""
    if os.name != "posix" or _are_javas():
        return True
    faulthandler.disable()  # puts back what stood before it was enabled
    return _are_javas()


def _are_javas() -> bool:
    return all("jvm" in library(handler(getattr(signal, name))) for name in JAVAS)


def handler(number: int) -> int:
    """The address of what handles a signal; 0 for the system's default."""
    action = ctypes.create_string_buffer(SIZE)
    ctypes.CDLL(None).sigaction(number, None, action)
    return ctypes.c_void_p.from_buffer(action).value or 0


def library(address: int) -> str:
    """The file name of the library that an address lies in, or nothing."""
    symbol = _Symbol()
    found = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol))
    return os.path.basename(symbol.library.decode()) if found and symbol.library else ""
