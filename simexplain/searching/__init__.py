"""Index and search: find the images nearest to one, and say why each was found."""
