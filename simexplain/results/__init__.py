"""What results share: saving, loading, JSON and what a notebook shows."""
