"""Checkpoints of other families, read without running anything in them, and made into checkpoints of this toolkit."""
