"""Knot policies, by the name in `chain.knots.policy`: files here with a table `POLICIES`."""
