"""What `scripts/benchmark.py` times, how, and the reports it writes."""
