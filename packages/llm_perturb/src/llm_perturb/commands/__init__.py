"""The commands: each module has the function whose flags it takes, and ``main``, which runs it on the command line."""
