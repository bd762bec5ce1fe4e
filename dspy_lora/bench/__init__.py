"""Speed and memory of LoRALM against plain vLLM and against DSPy over HTTP, as ratios of one run.

command.py    ``dspy-lora bench``: flags, the points of a sweep · report.py  the table's lines, the JSON
sweep.py      ``--sweep rank=8,16`` · picture.py  the ratios over the swept value
bench.py      what measurements share: LoRALMs of all adapters · figure.py  a figure and its bar
measure.py    one function a measurement: throughput, samples, mixed, memory, endings
defaults.py   the engine's defaults against other choices, on a CPU and on a GPU
latency.py    first and further tokens, one request at a time · adapters.py  what adapters cost plain vLLM
over_http.py  LoRALM against vLLM's server and ``dspy.LM``
loading.py    calls of adapters that are not in the engine · stream.py  an answer whose tokens' times are kept
workload.py   prompts of the adapters
shapes.py     a base model of random weights, and adapters for it
servers.py    what is compared with: plain vLLM and vLLM's OpenAI server, in child processes
raw.py        the child process that runs plain ``vllm.LLM.generate``
memory.py     memory of processes · endings.py  when a program and its engine are gone
joint.py      ``--joint``: LoRAGEPA against its halves · assignments.py  the race against the exhaustive search
"""
