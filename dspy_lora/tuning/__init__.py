"""``dspy-lora tune``: tile settings of ``engine/gpu_kernels.py`` for a GPU and a model's shapes, found by timing them.

engine/gpu_tuned.py takes what it writes, from the user's folder or from one for the GPU in ``tuned/``, where one ships.

command.py   ``dspy-lora tune``: flags, table
problem.py   what is timed: a product of engine/gpu_shapes.py at a rank and a number of tokens
inputs.py    random inputs of a problem, and what a kernel must make of them
settings.py  tile settings that a kernel may run with, and the neighbours of one
search.py    which setting is fastest, within a budget of time
trials.py    what was timed so far, on disk
kernels.py   times the kernels on the GPU and checks what they compute
files.py     writes the files that vLLM reads, and a record of what they are for
"""
