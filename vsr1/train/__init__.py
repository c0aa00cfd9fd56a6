"""Learning: supervised start, group-relative policy optimisation, and the rewards and losses both are made of."""
