"""GRPO on groups that were sampled elsewhere.

settings.py   what a user may set · loss.py  TRL's loss, token by token · batch.py  answers padded for a forward pass
trainer.py    an adapter in training, one step at a time · process.py  the process that holds it, and speaks JSON lines
"""
