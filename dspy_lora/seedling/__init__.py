"""The small model that ships, and how it was made.

words.py      words, and which of them training never sees · wordings.py  how rules are worded
sentences.py  the texts that tasks are about
task.py       what a task is · rules.py  rules decide the answer · skills.py  the other tasks · tasks.py  any of them
chats.py      tasks as chats, rendered by DSPy's own adapters
tokenizer.py  the tokenizer and its chat template
packing.py    chats and text as training rows · network.py  the network · pretrain.py  training from scratch
bars.py       the held-out measurements
router.py     the classifier of domains · work_orders.py  more rows for the work-order adapter
"""
