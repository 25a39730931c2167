"""The report: one HTML page that opens from disk and shows what was trained, on what, and how well it does."""
