"""Damaged and hostile files for every reader: see `targets.py` for what is read and `harness.py` for what counts as a fault."""
