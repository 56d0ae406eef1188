"""Chains in transformers' Trainer and in the trainers of TRL.

callback.py       `ChainCallback`, the callback for a trainer
wrapped_chain.py  a chain inside the trainer's PEFT model, and its checkpoints
lengths.py        steps of each link, tokens of rows, processes of the trainer
restarts.py       the trainer's optimizer and schedule at a knot
"""
