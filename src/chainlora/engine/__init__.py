"""Run batches through a model: hidden states, losses and scores, equal up to rounding, and fast."""
