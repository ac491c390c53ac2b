"""The command line: flags, help pages, exit codes, how much a command says."""
