"""What a run is: every key, its default, its checks. Imports no tensor library."""
