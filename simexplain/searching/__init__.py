"""Index and search: find the images nearest to one, and explain why each was found.

Public: ``search`` (``search.py``) with its ``SearchResult``; ``build_index``, ``update_index`` and
``remove_from_index`` (``index.py``); ``open_index`` and ``GalleryIndex`` (``index_gallery.py``).
"""
