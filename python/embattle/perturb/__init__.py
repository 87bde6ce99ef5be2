"""How a model is perturbed: sites, deltas, one batch under attack, strengths, guards."""
