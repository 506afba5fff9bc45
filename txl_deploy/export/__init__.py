"""From a checkpoint to an artifact: a folder with a graph, its vocabulary and a manifest."""
