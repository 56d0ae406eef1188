"""The keys of a config, their defaults and their checks. Imports no tensor library."""
