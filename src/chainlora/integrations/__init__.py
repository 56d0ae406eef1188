"""Chains in training loops of others: transformers' Trainer and the trainers of TRL.

callback.py       `ChainCallback`, which a trainer is given
wrapped_chain.py  a chain inside the trainer's PEFT model, and what its saves hold
plan.py           where the knots fall in a run whose steps the trainer counts
launched.py       the processes that a trainer runs in
restarts.py       the trainer's optimizer and schedule at a knot
"""
