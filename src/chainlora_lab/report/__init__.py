"""What the results of an experiment say: statistics, tables, figures."""
