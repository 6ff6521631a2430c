"""Where a model's files are, and what stands in them."""
