"""How a model is perturbed: sites, the unknowns there, one batch under attack, strengths, guards."""
