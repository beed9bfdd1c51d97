"""AVSL post hoc: heads, edges and reliabilities for a network that is already trained."""
