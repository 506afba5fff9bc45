"""Train a Transformer-XL language model: data, model, optimizer, trainer, evaluation. Knows nothing of export or runtimes."""

from __future__ import annotations

__version__ = "0.1.0"
