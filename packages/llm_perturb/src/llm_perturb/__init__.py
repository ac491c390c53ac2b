"""The measuring instrument: perturb chosen weights of a causal language model, measure what it costs."""
