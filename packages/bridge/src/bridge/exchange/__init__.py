"""What passes between the packages: errors, flags, tables, run folders. All that the others may import of bridge."""
