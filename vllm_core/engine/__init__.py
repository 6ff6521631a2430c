"""Requests, blocks, scheduling and the loop: everything that happens on the host."""
