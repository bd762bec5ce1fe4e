"""Rows of a domain become an adapter.

data.py renders and tokenises rows, settings.py says how to train, sft.py trains, watch.py and scoring.py measure while
it does, run.py keeps the book, command.py is ``dspy-lora train``.
"""
