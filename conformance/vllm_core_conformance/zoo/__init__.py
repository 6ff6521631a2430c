"""Wrong and honest backends with which the suite tests itself.

Knows: nothing. Does not know: any vendor.
"""
