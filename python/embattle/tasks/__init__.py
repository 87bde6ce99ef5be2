"""What a job needs to know of a model and its data."""
