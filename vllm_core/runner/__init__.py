"""Turns a plan into programs on one device: packing, compiling, fetching, memory."""
