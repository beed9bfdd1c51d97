"""Pictures: reading, preprocessing and the way back."""
