"""What the host counts: its own totals, and what vLLM's scheduler says."""

import os
import time
from typing import Any


class Statistics:
    """Running totals and vLLM's newest scheduler statistics."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.requests = self.prompt_tokens = self.output_tokens = 0
        self.running = self.waiting = 0
        self.kv_cache_usage = 0.0
        self.cache_queries = self.cache_hits = 0
        self._window = (self.started, 0)

    def count(self, prompt_tokens: int, output_tokens: int) -> None:
        """Adds one finished request."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.output_tokens += output_tokens

    def record(self, scheduler: Any) -> None:
        """Takes over vLLM's ``SchedulerStats``."""
        self.running, self.waiting = scheduler.num_running_reqs, scheduler.num_waiting_reqs
        self.kv_cache_usage = scheduler.kv_cache_usage
        self.cache_queries += scheduler.prefix_cache_stats.queries
        self.cache_hits += scheduler.prefix_cache_stats.hits

    def snapshot(self) -> dict[str, Any]:
        """The figures ``engine_stats()`` shows; tokens per second since the last snapshot."""
        now = time.monotonic()
        since, tokens = self._window
        self._window = (now, self.output_tokens)
        return {
            "running": self.running,
            "waiting": self.waiting,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "output_tokens_per_s": (self.output_tokens - tokens) / max(now - since, 1e-9),
            "kv_cache_usage": self.kv_cache_usage,
            "prefix_cache_queries": self.cache_queries,
            "prefix_cache_hits": self.cache_hits,
            "uptime_s": now - self.started,
            "pid": os.getpid(),
        }
