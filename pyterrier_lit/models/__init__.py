"""Networks and checkpoints: code that reads, runs and writes them. No module in this folder reads a result frame."""
