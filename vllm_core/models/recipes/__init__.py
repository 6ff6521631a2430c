"""One module per family of models."""
