"""Statistics of a validation: which targets to measure, and how well scores and effects agree."""
