"""What a Python process of ours is started with."""

import os
from pathlib import Path


def child_environment() -> dict[str, str]:
    """The environment, so that the child finds this package where it was not installed, and its lines come at once."""
    path = [entry for entry in (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[1])) if entry]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
