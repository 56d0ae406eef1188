"""Statistics of a handful of paired runs: tests, intervals, verdicts, power; no model in sight."""
