"""The small model that ships, and how it was made.

words.py      words, and which of them training never sees
sentences.py  the texts that tasks are about
tasks.py      endless instruction-following tasks, each with rows whose answers the prompt decides
chats.py      tasks as chats, rendered by DSPy's own adapters
tokenizer.py  the tokenizer and its chat template
pretrain.py   training from scratch
bars.py       the held-out measurements
"""
