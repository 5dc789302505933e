"""Scaling studies: parameters and FLOPs counted exactly, models matched, laws fitted, architectures compared."""
