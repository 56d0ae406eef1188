"""From rows in files or on the Hub to tokens and targets."""
