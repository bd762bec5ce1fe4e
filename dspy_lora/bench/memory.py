"""Memory of processes: their proportional set size (PSS), in which what processes share is counted once.

What they write alone tells growth: a library's pages are shared with whoever else runs, and count for more when that
one ends.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

_PROC = Path("/proc")
ALL = frozenset({"Pss"})
WRITTEN = frozenset({"Pss_Anon", "Pss_Shmem"})  # heaps and shared memory, no file


def megabytes(pid: int | str = "self", kinds: Container[str] = ALL) -> float:
    """PSS of one process in MB, with the shared-memory segments it holds; or the kinds of it that are named."""
    lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.split(":")[0] in kinds)


def group_megabytes(pid: int, kinds: Container[str] = ALL) -> float:
    """PSS of all processes in the process group of ``pid``, in MB; or the kinds of it that are named."""
    group, total = os.getpgid(pid), 0.0
    for entry in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if os.getpgid(int(entry.name)) == group:
                total += megabytes(entry.name, kinds)
    return total


# Prints what LoRALM adds to a process that already uses DSPy: its own modules, the registry, the client's threads.
_CALLER = """
import logging, sys
import dspy
from dspy_lora.bench.memory import megabytes
logging.getLogger("dspy").setLevel(logging.ERROR)
plain = dspy.LM("openai/none", api_base="http://127.0.0.1:1/v1", api_key="none")
before = megabytes()
from dspy_lora import LoRALM
lms = [LoRALM("seedling", domain=domain, cache=False, max_tokens=4) for domain in sys.argv[1:]]
for _ in range(10):
    for lm in lms:
        lm("Hello.")
print(megabytes() - before)
"""


def caller_megabytes(domains: list[str]) -> float:
    """What LoRALMs of all domains and 120 calls add to a fresh process that has imported DSPy, in MB."""
    done = subprocess.run([sys.executable, "-P", "-c", _CALLER, *domains], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])
