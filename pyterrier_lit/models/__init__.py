"""Networks and checkpoints: token ids and tensors in, tensors out. Knows no queries and no rankings."""
