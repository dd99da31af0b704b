"""What should happen: pure functions over the model. No I/O, no clock, no randomness."""
