"""Thousands of comparisons: shared images embedded once, resumable, over several processes."""
