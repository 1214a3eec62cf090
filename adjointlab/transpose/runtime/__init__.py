"""Programs that run, their derivatives, and whether they are up to date."""
