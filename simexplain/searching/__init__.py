"""Index and search: find the images nearest to one, and explain why each was found."""
