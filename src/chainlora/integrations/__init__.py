"""Chains in training loops of others: transformers' Trainer and the trainers of TRL.

callback.py       `ChainCallback`, which a trainer is given
wrapped_chain.py  a chain inside the trainer's PEFT model, and what its saves hold
lengths.py        where knots fall in the trainer's run, its rows and its processes
restarts.py       the trainer's optimizer and schedule at a knot
"""
