"""Reports: read the results of evaluations, compare them, and show them on one page."""
