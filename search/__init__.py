"""Which coefficients? The search for the parameters of a merge that score best, as a study that lasts."""
