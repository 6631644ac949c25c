"""Networks and checkpoints: token ids and tensors in, tensors out. No module here deals with queries or rankings."""
