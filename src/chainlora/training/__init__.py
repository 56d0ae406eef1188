"""The training loop around the heart."""
