"""Faults, tried by the hundred: `python tests/faults`."""
