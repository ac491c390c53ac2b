"""Global discovery: score every weight of a causal language model, keep the exact top-K."""
