"""The heart: links, chains, knots, and what they need of a model. `chain.py` is Algorithm 1."""
