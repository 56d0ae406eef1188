"""Models that are no causal language models, tiny, and what a chain on them must do."""
