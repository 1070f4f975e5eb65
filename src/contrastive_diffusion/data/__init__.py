"""Data with an exact truth (``mixtures``), toy laws (``toys``), images (``images``, read by ``archives``, changed by ``augment``)."""
