"""Decide when knots are tied, and tie them, in every training loop.

numbers.py   open values of a config, decided once at the start of a run
policy.py    the interface of knot policies, and the table of their names
driver.py    `Knots`: asks the policy after each step, and ties shares
moments.py   carries an optimizer's moments over a soft knot
"""
