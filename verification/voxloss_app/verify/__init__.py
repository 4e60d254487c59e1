"""`voxloss verify`: the results for a loss on a terminal, as a page and as JSON; and mutation testing."""
