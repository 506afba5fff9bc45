"""One small protocol, `base.Runtime`, and one file per way of running the model; `registry` opens them by name."""
