"""Faults, tried by the hundred: `python -m faults` from this folder's parent."""
