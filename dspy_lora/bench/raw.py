"""The child process that runs plain ``vllm.LLM.generate``: ``python -m dspy_lora.bench.raw SETTINGS_JSON``.

It is started with what LoRALM's engine is started with. A line of JSON on standard input asks, one on standard output
answers.
"""

import json
import os
import sys
import time
from typing import Any

from dspy_lora.engine.arguments import engine_args


def _generate(llm: Any, loras: dict[str, Any], ask: dict[str, Any]) -> dict[str, Any]:
    """Times ``generate`` on rendered prompts; the chat template is applied before the clock starts."""
    from vllm import SamplingParams

    template = llm.get_tokenizer().apply_chat_template
    prompts = [template(messages, add_generation_prompt=True, tokenize=False) for messages in ask["messages"]]
    chosen = [loras[name] if name else None for name in ask["adapters"]]
    began = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(**ask["sampling"]), lora_request=chosen, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(len(sample.token_ids) for out in outputs for sample in out.outputs)}


def main() -> None:
    """Serves until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever vLLM prints goes to the log
    settings = json.loads(sys.argv[1])
    args = engine_args(settings)
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    llm = LLM(**args)
    loras = {
        adapter["name"]: LoRARequest(adapter["name"], index, adapter["path"])
        for index, adapter in enumerate(settings["adapters"], start=1)
    }
    from vllm.platforms import current_platform

    print(json.dumps({"device": current_platform.device_type}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_generate(llm, loras, json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
