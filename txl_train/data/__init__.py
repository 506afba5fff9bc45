"""From text to streams of token ids: data sets, vocabularies, corpora, segments, tokenizers, baselines. Imports no PyTorch."""
