"""Knot policies, by the name in `chain.knots.policy`: each file here has a table `POLICIES`."""
