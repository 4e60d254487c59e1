"""`voxloss verify`: a loss under examination, on a terminal, as a page and as JSON; and the kill matrix."""
