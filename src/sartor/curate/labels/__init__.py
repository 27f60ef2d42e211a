"""Class labels of rows, and rows whose label or reply looks wrong."""
