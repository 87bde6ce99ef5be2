"""Adapters to other training libraries; each imports its library when it is imported itself."""
