"""Sequences side by side in one row, without padding, common beginnings computed once."""
