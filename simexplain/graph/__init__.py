"""The AVSL graph on plain tensors: nodes, reliabilities, edges, distances of all pairs."""
