"""Serving on Triton Inference Server: the repository of models that it reads, and what runs within its Python backend."""
