"""Raw data becomes the rows that ``dspy-lora train`` and ``dspy-lora evaluate`` read.

prepared.py     the whole way, from a source to the rows, their report and their folder
sources.py      files, folders, Hugging Face data sets and rows in memory, each row with its place
files.py        CSV, JSON lines, JSON, Parquet
accept.py       which records are rows of the task, and why the others are not
duplicates.py   equal and nearly equal rows
split.py        training, validation and test rows
report.py       what was read, kept and set aside, in figures and as a table
folder.py       the folder of prepared rows
command.py      ``dspy-lora prepare``
"""

from dspy_lora.prepare.prepared import PrepareConfig, Prepared, prepare

__all__ = ["PrepareConfig", "Prepared", "prepare"]
