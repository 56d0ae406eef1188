"""Objectives, by the name that data gives them: each file here has a table `OBJECTIVES`."""
