"""The verbs: load, calibrate, quantize, evaluate, bench, compare. The command line calls only these."""
