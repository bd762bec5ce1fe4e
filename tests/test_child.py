"""The environment of Python processes of ours."""

import os
from pathlib import Path

import pytest

from dspy_lora import child

FOLDER = str(Path(child.__file__).parents[1])


@pytest.mark.parametrize("where", ["purelib", "platlib", None])
@pytest.mark.parametrize("given", [None, "/somewhere"])
def test_the_package_is_named_only_where_it_was_not_installed(where, given, monkeypatch):
    """A folder of installed packages in PYTHONPATH would come before the standard library."""
    monkeypatch.setattr(child.sysconfig, "get_path", lambda name: FOLDER if name == where else "/installed")
    monkeypatch.setenv("PYTHONPATH", given or "")
    wanted = [entry for entry in (given, None if where else FOLDER) if entry]
    assert child.child_environment()["PYTHONPATH"] == os.pathsep.join(wanted)
