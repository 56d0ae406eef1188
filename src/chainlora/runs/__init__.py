"""Runs on disk: their history and files, exports, inspection, costs."""
