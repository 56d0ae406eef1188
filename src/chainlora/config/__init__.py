"""What a run is: every key with its default, and how a file becomes a checked config. Imports no
tensor library."""
