"""The engine that goes through a model one decoder layer at a time."""
