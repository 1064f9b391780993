"""Results of evaluations, read back, compared, and shown on one page."""
