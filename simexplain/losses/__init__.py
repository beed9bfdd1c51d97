"""Training objectives: similarity mining, AVSL, and what they are compared with."""
