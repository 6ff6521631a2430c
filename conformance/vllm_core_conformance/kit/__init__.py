"""The vendor kit: a new backend as a complete distribution.

Knows: what a backend's distribution is made of. Does not know: cases, runs, reports.
"""
