"""Read the original downloads of published data sets by their recipes."""
