"""Every command of the command line, and all input and output around a step."""
