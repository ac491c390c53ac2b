"""Every causal model type of transformers as a tiny random model: what the tools give, against plain autograd."""
