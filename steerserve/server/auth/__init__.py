"""Who may ask for what: keys, policies, rates, and the bound `admit`."""
