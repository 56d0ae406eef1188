"""A batch through a model: hidden states, losses and scores, fast and the same to rounding."""
