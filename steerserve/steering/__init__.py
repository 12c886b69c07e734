"""How an activation is changed: attributes on disk, operators, and the plan a batch's forward reads."""
