"""Schemes: a format, the algorithm that fills it, and its options, under a name. One file a scheme; see `registry`."""
