"""One exception for everything that the person at the keyboard can put right."""


class InputError(ValueError):
    """Bad input: one line that names the file, the key and what would be valid.

    ``run_all.py`` prints the message on stderr and exits with code 2.
    """
