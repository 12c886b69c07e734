"""What a request pushes: sites, units, cost, limits, controls, and what they come to together."""
