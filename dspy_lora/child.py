"""What a Python process of ours is started with."""

import os
import sysconfig
from pathlib import Path


def child_environment() -> dict[str, str]:
    """The environment, so that the child finds this package where it was not installed, and its lines come at once.

    Where it was, its folder is on the child's path already, after the standard library; in PYTHONPATH it would come
    before, and other packages there may have the names of modules of that library.
    """
    folder = str(Path(__file__).parents[1])
    installed = folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    path = [entry for entry in (os.environ.get("PYTHONPATH"), None if installed else folder) if entry]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}
