"""Error messages for faulty checkpoints."""

from pathlib import Path


def wrong_weights(source: str, problems: list[str]) -> ValueError:
    """Return the error for a checkpoint whose weights do not match its architecture.

    Args:
        source: the name of the checkpoint.
        problems: descriptions of the wrong weights. The message lists up to ten of them.
    """
    listed = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return ValueError(f"{source} does not hold the weights of this model: {listed}")


def damaged(file: Path, error: BaseException) -> ValueError:
    """Return the error for a file that cannot be read. `error` is the error that was raised while reading the file."""
    return ValueError(f"{file} cannot be read: it is cut short or damaged; fetch it again ({first_line(error)})")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of the error's type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
