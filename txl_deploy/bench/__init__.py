"""Latency, throughput and perplexity of runtimes, measured side by side, and the report made of them."""
