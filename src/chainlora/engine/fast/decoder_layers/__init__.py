"""A faster forward for decoder layers of Llama's shape."""
