"""What to tell a user whose engine did not come up, or died."""

import re
import signal

_LOG_LINES = 20
# vLLM's last word where one of its processes failed to start; the cause stands above it in the log.
_SEE_ABOVE = "see root cause above"
_RAISED = re.compile(r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] )?(?P<error>[\w.]*(?:Error|Exception): .+)$", re.MULTILINE)


def ending(status: int) -> str:
    """Words a process's exit status."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    killer = "; the system does that when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{killer}"


def last_lines(log: str) -> str:
    """The end of the engine's log."""
    return "\n".join(log.splitlines()[-_LOG_LINES:]) or "(empty)"


def root_cause(cause: str, log: str) -> str:
    """The error of the process that failed first, where vLLM only says that there is one."""
    if _SEE_ABOVE not in cause.lower():
        return cause
    errors = [match["error"] for match in _RAISED.finditer(log)]
    causes = [error for error in errors if _SEE_ABOVE not in error.lower()]
    return causes[0] if causes else cause


def advice(cause: str, log: str) -> str:
    """What to do about the failures that users meet most; of the log, what was raised counts alone.

    The log of an engine in good health speaks of its memory and its KV cache too.
    """
    raised = [match["error"] for match in _RAISED.finditer(log)]
    text = "\n".join([cause, *raised]).lower()
    if "kv cache" in text and ("memory" in text or "larger than" in text or "not enough" in text):
        return (
            ". Give the KV cache more room (engine={'kv_cache_gib': ...} on a CPU, 'gpu_memory_utilization' on a GPU) "
            "or lower 'max_model_len'."
        )
    if "insufficient space in /dev/shm" in text:
        return ". Shared memory is too small: in a container, start it with --shm-size=2g; else end other engines."
    if "out of memory" in text or "free memory on device" in text or "cannot allocate memory" in text:
        return (
            ". The machine has too little free memory: end what else uses it, or lower 'gpu_memory_utilization' or "
            "'kv_cache_gib'."
        )
    if "address already in use" in text:
        return ". A port it needs is in use: end the other process, or set VLLM_PORT to a free one."
    return ""
