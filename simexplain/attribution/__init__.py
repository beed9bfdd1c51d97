"""Taking an AVSL distance apart: the account, its pictures and files, and the verbs."""
