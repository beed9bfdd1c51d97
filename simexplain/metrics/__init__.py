"""How far to believe a map: curves, masks, stability and intervals on plain tensors."""
