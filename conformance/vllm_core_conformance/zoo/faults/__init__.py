"""Wrong backends by area. Each module has FAULTS, a tuple of `Fault`.

Knows: nothing. Does not know: any case.
"""
