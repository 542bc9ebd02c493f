"""Stage 5: one metric per file, intervals in :mod:`u2a.evaluation.stats`, arms and table in ``evaluate``."""
