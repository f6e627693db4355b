"""What scripts/measure_scale.py is made of: cases, runs and the page."""
