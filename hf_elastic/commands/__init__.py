"""Subcommands of `hf-elastic`: each module has a docstring (its help), `add_arguments` and `run`."""
