"""Runs that are broken on purpose, resumed, and held to the bit to an undisturbed one: `python -m tests.faults`."""
