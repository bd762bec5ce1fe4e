"""Free heap that an engine on a CPU gives back to the system.

Batches of every size leave holes in glibc's heap that nothing of another size fits into: it grows by megabytes over
thousands of calls while what is in use stays the same, and keeps hundreds of megabytes that are free.
"""

import ctypes
import threading
import time

SECONDS = 10.0  # between two times; what is given back and needed again costs page faults


def keep_trimmed(seconds: float = SECONDS) -> None:
    """Gives free pages back every so many seconds while this process lives; does nothing where the C library cannot."""
    try:
        trim = ctypes.CDLL(None).malloc_trim  # which lets other Python threads run
    except (OSError, AttributeError):
        return

    def work() -> None:
        while True:
            time.sleep(seconds)
            trim(0)

    threading.Thread(target=work, name="dspy-lora-trim", daemon=True).start()
