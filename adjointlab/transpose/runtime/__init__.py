"""What runs: programs, their derivatives, and the way of a call."""
