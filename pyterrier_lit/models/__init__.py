"""Networks and checkpoints: token ids and tensors in, tensors out. These modules do not deal with queries or rankings."""
