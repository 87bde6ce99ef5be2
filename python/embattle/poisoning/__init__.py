"""Attacks on the data that a model is trained on: fake profiles and reviews that are optimised."""
