"""How far to believe the maps of a model: faithfulness, pointing and sanity of whole methods."""
