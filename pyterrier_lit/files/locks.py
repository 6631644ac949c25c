"""A lock that allows one writer per output file. This module does not deal with runs."""

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """A context manager that holds the lock of an output file.

    The lock is a file in the folder of the output, with the name `.{name of the output}.lock`. The folder is created
    if necessary. The operating system releases the lock when the process ends, even by a crash. If the file system does
    not support locks, a warning appears and nothing is locked. Raises BlockingIOError if another process or thread
    holds the lock, and OSError if the folder cannot be written to.
    """
    path = output.with_name(f".{output.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _opened(path)
        while not _locked(held, output):  # the previous writer removed the lock file after it was opened here
            held.close()
            held = _opened(path)
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(f"{path.parent} cannot be written to ({error}); give another output") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
        held.close()


def _opened(path: Path) -> IO[str]:
    return open(path, "a+", encoding="utf-8")


def _locked(file: IO[str], output: Path) -> bool:
    """Lock an opened file, and write into it which process holds the lock.

    Returns False if the previous writer has removed the file in the meantime, else True. Raises BlockingIOError if
    another process or thread holds the lock.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        file.close()
        raise BlockingIOError(
            f"{output} is being written already, by {holder or 'another process'}; wait until that has ended, or give"
            " another output"
        ) from None
    except (ImportError, OSError) as error:
        warnings.warn(
            f"{output.parent} has no locks ({error}): see to it that nothing else writes {output.name}", stacklevel=5
        )
        return True
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    return False
