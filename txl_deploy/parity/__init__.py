"""Agreement of two runtimes over many segments, each feeding back its own memory."""
