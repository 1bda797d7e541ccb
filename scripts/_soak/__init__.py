"""Long runs of one simulated engine."""
