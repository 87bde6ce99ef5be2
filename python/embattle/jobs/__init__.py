"""What the command line does: train, audit, inspect, and the folders and recipes they share."""
