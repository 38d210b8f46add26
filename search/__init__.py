"""Which coefficients? The search for the weights of a merge. Nothing here yet: `merging` comes first."""
