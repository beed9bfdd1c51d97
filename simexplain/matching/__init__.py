"""Which region of one image answers to which of another: the exact matrix, its pictures, files."""
