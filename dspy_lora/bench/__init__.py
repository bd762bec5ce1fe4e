"""Speed and memory of LoRALM against plain vLLM and against DSPy over HTTP, as ratios of one run.

command.py    ``dspy-lora bench``: flags, table, JSON
measure.py    one function a measurement
workload.py   prompts of the twelve domains
servers.py    what is compared with: plain vLLM and vLLM's OpenAI server, in child processes
raw.py        the child process that runs plain ``vllm.LLM.generate``
memory.py     memory of processes
"""
