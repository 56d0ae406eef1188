"""A run on disk, and what can be made of it: links, exports, inspection, plots, costs."""
