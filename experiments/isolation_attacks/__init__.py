"""The escape suite: attacks, the witness that judges them from outside, neighbours, controls."""
