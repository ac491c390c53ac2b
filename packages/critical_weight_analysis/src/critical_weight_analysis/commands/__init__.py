"""The commands, as functions of their options."""
