"""Export a trained Transformer-XL, prove that the export is the model, measure it. Builds on `txl_train`, which never imports this."""
