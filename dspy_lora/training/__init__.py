"""Rows of a domain become an adapter.

data.py renders and tokenises rows, noise.py makes noisy copies of them, settings.py says how to train, loading.py loads
the base, shape.py checks the adapter's shape, order.py orders the rows, sft.py trains, prompt_loss.py where prompts
count too, watch.py, scoring.py and validation_loss.py measure while it does, lock.py keeps the folder for one run,
run.py its book, checkpoints.py and failures.py see to runs that end early, publishing.py hands out the adapter,
sweep.py compares runs, command.py is ``dspy-lora train``.

provider.py is what DSPy's weight optimizers train through: jobs.py a run in a process of its own, chats.py its rows;
reinforce.py is a run of GRPO, grpo/ its loss and its process. full.py trains a whole copy, to compare with.
"""
