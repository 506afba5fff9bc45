"""Wrong graphs, wrong runtimes and wrong labels, each with a switch: what `mutations` lists and `self_test` lets the checks find."""
