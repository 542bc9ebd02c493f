"""Slow, dense, obvious oracles: what the fast code must agree with. Used by tests and documentation, by no stage."""
