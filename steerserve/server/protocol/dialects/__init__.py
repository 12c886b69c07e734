"""Requests in the forms of other steering products: Ember, Neuronpedia, EasySteer."""
