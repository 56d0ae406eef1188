"""Rivals, each ported from its formula: one short file with its arXiv id."""
