"""What an experiment asks: its file, the cells it expands to, the choice of hyper-parameters."""
