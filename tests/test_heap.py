"""The heap of an engine's process on a CPU."""

import ctypes
import subprocess
import sys

import pytest

from dspy_lora.engine import heap

# Holes of a megabyte between blocks that stay, below glibc's threshold for memory of its own.
_HOLES = """
import ctypes, sys, time
from dspy_lora.bench.memory import WRITTEN, megabytes
from dspy_lora.engine.heap import keep_trimmed

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
blocks = [libc.malloc(size) for _ in range(100) for size in (1 << 20, 1 << 16)]
for block in blocks:
    ctypes.memset(block, 1, 64)
for block in blocks[::2]:
    ctypes.memset(block, 1, 1 << 20)
    libc.free(block)
before = megabytes(kinds=WRITTEN)
keep_trimmed(0.05)
time.sleep(1)
print(before - megabytes(kinds=WRITTEN))
"""


def _has_trim():
    try:
        return bool(ctypes.CDLL(None).malloc_trim)
    except (OSError, AttributeError):
        return False


@pytest.mark.skipif(not _has_trim(), reason="the C library has no malloc_trim")
def test_free_heap_goes_back_to_the_system():
    done = subprocess.run([sys.executable, "-P", "-c", _HOLES], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 80


def test_a_c_library_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    started = []
    monkeypatch.setattr(heap.threading, "Thread", lambda **given: started.append(given))
    heap.keep_trimmed()
    assert not started
