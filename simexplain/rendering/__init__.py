"""Drawing: heatmaps over pictures and whole figures."""
