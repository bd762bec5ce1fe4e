"""The engine: vLLM in a child process of ours, and what DSPy calls in the user's process.

local.py      what ``dspy.LM`` calls · client.py  the user's side: sends requests, restarts the child once when it dies
protocol.py   the messages between the two · host_process.py  the child as its user sees it
host.py       the child process that owns vLLM's ``AsyncLLM``, the tokenizer, the chat template and the parsers
residents.py  how adapters come into vLLM and out · lora_loading.py  its workers read them beside the requests
arguments.py  what vLLM is started with · grammar.py  JSON schemas with bounded whitespace · statistics.py  counts
translate.py  ``dspy.lm15`` requests and responses to and from messages
remote.py     servers that speak the OpenAI API instead of a child process · routes.py  what model strings stand for
settings.py   what an engine is started with · openai_server.py  vLLM's own server, started with the same settings
server_words.py  what a user's words for that server say
failures.py   what to tell a user whose engine did not come up, or died
core_process.py  how vLLM's core starts on a CPU · processes.py  ending an engine with everything that belongs to it
parsers.py    vLLM's reasoning and tool parsers · cpu_lora.py  LoRA on the CPU · heap.py  its heap
gpu_lora.py   LoRA on an NVIDIA GPU · gpu_kernels.py  its Triton kernels · gpu_tiles.py  how they cut a product
gpu_shapes.py a model's products · gpu_tuned.py  which folder of `dspy-lora tune` fits an engine
samples.py    n samples of a call · flights.py  equal calls at once · turns.py  more adapters than slots
"""
