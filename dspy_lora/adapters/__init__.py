"""Adapters: what an engine can serve (``checks.py``), and where revisions are kept (``registry.py``)."""
