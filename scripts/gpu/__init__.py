"""Checks that a machine with a GPU runs."""
