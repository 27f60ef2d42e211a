"""Routes of the studio, one file for each group of pages."""
