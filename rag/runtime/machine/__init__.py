"""The machine: what it is, how time on it is measured, and records of measurements."""
