"""Data with an exact truth (``mixtures``), toy laws (``toys``) and, later, images."""
