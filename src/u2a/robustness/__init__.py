"""Does the unlearning hold: relearning attacks, quantised weights, changed prompts, and the table of all three."""
