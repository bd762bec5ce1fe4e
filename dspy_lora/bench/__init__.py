"""Speed and memory of LoRALM against plain vLLM and against DSPy over HTTP, as ratios of one run.

command.py    ``dspy-lora bench``: flags, table, JSON
measure.py    one function a measurement
workload.py   prompts of the twelve domains
shapes.py     a base model of random weights, and adapters for it
servers.py    what is compared with: plain vLLM and vLLM's OpenAI server, in child processes
raw.py        the child process that runs plain ``vllm.LLM.generate``
memory.py     memory of processes · endings.py  when a program and its engine are gone
joint.py      ``--joint``: LoRAGEPA against its halves · assignments.py  the race against the exhaustive search
"""
