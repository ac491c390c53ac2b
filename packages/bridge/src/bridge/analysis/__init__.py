"""Statistics of discoveries and validations: pure functions from tables and arrays to numbers, one topic a file."""
