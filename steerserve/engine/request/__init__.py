"""The state of one row: canvas, block cursor, interventions, controllers, KL budget, caches."""
