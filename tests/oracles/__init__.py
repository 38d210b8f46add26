"""Independent truths that the tests compare with: slow formulas in float64, and mergekit itself."""
