"""Plans a validation, starts llm_perturb's script in its own environment and checks what it wrote."""
