"""Equal ways to compute one operation, and the rule that chooses among them."""
