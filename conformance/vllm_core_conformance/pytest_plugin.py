"""Runs the cases as pytest items."""
