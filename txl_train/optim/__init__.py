"""Optimizers and learning rates: `lamb` and `schedules` compute, `build` finds an optimizer by name."""
