"""How a program that uses LoRALM ends: when Ctrl-C gives control back, and when nothing of a killed one is left."""

import os
import signal
import subprocess
import sys
import time

from dspy_lora.engine.processes import members
from dspy_lora.errors import EngineError

_LONGEST_S = 60  # after which an engine that is still there counts as left behind
_UNDER_WAY_S = 1.0  # into a call that takes several seconds
_PROGRAM = """
import signal
from dspy_lora import LoRALM
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a command that a shell runs in the background ignores
lm = LoRALM("seedling", cache=False, max_tokens=1900, ignore_eos=True)
lm.preload()
print(lm.engine_stats()["pid"], flush=True)
try:
    while True:
        lm("Hello.")
except KeyboardInterrupt:
    print("back", flush=True)
    while True:
        lm("Hello.")
"""


def seconds_to_end() -> tuple[float, float]:
    """Interrupts a program in a call, and kills it in the next one.

    Returns:
        Seconds from Ctrl-C until the program goes on, and from SIGKILL until no process of its engine is left.

    Raises:
        EngineError: The program did not start or did not go on, or its engine is still there after a minute.
    """
    command = [sys.executable, "-P", "-c", _PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            group = os.getpgid(int(_line(process)))
            time.sleep(_UNDER_WAY_S)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _line(process)
            back = time.monotonic() - began
            time.sleep(_UNDER_WAY_S)
        finally:
            began = time.monotonic()
            process.kill()
    while members(group):
        if time.monotonic() - began > _LONGEST_S:
            raise EngineError(f"an engine is left {_LONGEST_S} s after its program was killed: {members(group)}")
        time.sleep(0.02)
    return back, time.monotonic() - began


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline().strip()):
        raise EngineError("the program that was to be interrupted ended by itself")
    return line
