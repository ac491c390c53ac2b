"""The files that discovery and perturbation exchange, and the commands that join the two."""

__version__ = "0.1.0"
