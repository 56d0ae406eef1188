"""When knots are tied, and tying them: the same for every loop.

numbers.py   what a config leaves open, as numbers, decided once at the start of a run
policy.py    what a policy is told after a step, what it answers, and those that a config can name
driver.py    `Knots`: what is due after a step, done to chain and optimizer
moments.py   an optimizer's moments carried over a soft knot
"""
