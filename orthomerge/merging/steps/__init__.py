"""Steps that several methods share: trim, drop, elect, decompose, decouple; pure functions."""
