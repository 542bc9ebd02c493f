"""What a run will cost, told before it starts: ``u2a run --dry-run``."""
