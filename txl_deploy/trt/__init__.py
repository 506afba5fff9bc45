"""TensorRT and TensorRT-RTX: one adapter over their Python packages, profiles, building, reading an engine back."""
