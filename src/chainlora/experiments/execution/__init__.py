"""How the cells of an experiment are computed and recorded."""
