"""Comparison of methods at equal compute: arms, budgets, cells and the protocol that fixes them beforehand."""
