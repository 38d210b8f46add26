"""From data sets to one model: training in bags, merging of the members, updates."""
