"""The model: the only definition of Transformer-XL in the toolkit, for training, scoring and export alike."""
