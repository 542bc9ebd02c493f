"""Stage 3: the bi-level problem. Which negatives to unlearn, and how strongly."""
