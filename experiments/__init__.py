"""Experiments: one thin file each, a record of a question and the command that answers it."""
