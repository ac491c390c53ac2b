"""Simulated worlds whose truth is known, and how often each claim of the project holds in them."""
