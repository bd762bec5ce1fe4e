"""``dspy-lora tune``: tile settings of ``engine/gpu_kernels.py`` for a GPU and a model's shapes, found by timing them.

No GPU has run it yet, so the command line does not offer it: cli.py lists a command once it has been seen to work.

command.py   ``dspy-lora tune``: flags, table
shapes.py    which products the kernels compute for a model, from its config.json
settings.py  tile settings that a kernel may run with, and the neighbours of one
search.py    which setting is fastest, within a budget of time
trials.py    what was timed so far, on disk
kernels.py   times the kernels on the GPU and checks what they compute
files.py     the files that vLLM reads, and whether a folder of them fits an engine
"""
