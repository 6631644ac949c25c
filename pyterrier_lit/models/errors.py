"""Error messages for faulty checkpoints."""

from pathlib import Path


def wrong_weights(source: str, problems: list[str]) -> ValueError:
    """The error for a checkpoint whose weights do not match its architecture. The message lists up to ten of the
    `problems`."""
    listed = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
    return ValueError(f"{source} does not hold the weights of this model: {listed}")


def damaged(file: Path, error: BaseException) -> ValueError:
    """The error for a file that cannot be read. error: what was raised while reading it."""
    return ValueError(f"{file} cannot be read: it is cut short or damaged; fetch it again ({first_line(error)})")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
