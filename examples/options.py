"""Types of the examples' options for argparse: a wrong word ends a run before it has asked anything."""

import argparse
from pathlib import Path


def positive(word: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number of at least 1")
    return int(word)


def output_file(word: str) -> Path:
    """A file to write; its folder is made where it is missing.

    Raises:
        argparse.ArgumentTypeError: It is a folder, or its folder cannot be made.
    """
    path = Path(word)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise argparse.ArgumentTypeError(
            f"{word!r}: no folder {str(path.parent)!r} can be made: {exc.strerror}"
        ) from exc
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{word!r} is a folder. Name a file in it.")
    return path
